// Rows of values, weighted and added up for a group of query rows; what holds for keys (rows.inl)
// holds here. Sums of kSumKeys keys are added to acc. Where that many are taken part by part, the
// sums lie on the stack from part to part.

/// Where the sums of some rows come from and where they go.
struct PvSums {
  const float *from; ///< null: they begin with 0
  size_t ld_from;
  float *to;
  size_t ld_to;
  bool last; ///< `to` is acc, to which they are added

  PvSums rows(int r) const {
    return {from ? from + at(r, ld_from, 0) : nullptr, ld_from, to + at(r, ld_to, 0), ld_to, last};
  }
};

/// Sums that are taken at once.
MIXEDKV_INLINE PvSums sums_to(float *acc, size_t ld_acc) { return {nullptr, 0, acc, ld_acc, true}; }

/// Those of a part of the keys of a sum; stack [rows, ld] keeps them between the parts.
MIXEDKV_INLINE PvSums sums_of_part(bool first, bool last, float *stack, size_t ld, float *acc,
                                   size_t ld_acc) {
  const float *from = first ? nullptr : stack;
  return last ? PvSums{from, ld, acc, ld_acc, true} : PvSums{from, ld, stack, ld, false};
}

template <int R, int B, bool Partial>
MIXEDKV_INLINE void begin_sums(const PvSums &sums, int i, int n, f32v (&sum)[R][B]) {
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b)
      sum[r][b] = zero();
  if (sums.from)
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) {
        const float *a = sums.from + at(r, sums.ld_from, i + b * kLanes);
        sum[r][b] = Partial ? load_n(a, n) : load(a);
      }
}

template <int R, int B, bool Partial>
MIXEDKV_INLINE void end_sums(const PvSums &sums, int i, int n, f32v (&sum)[R][B]) {
  if (sums.last)
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) {
        const float *a = sums.to + at(r, sums.ld_to, i + b * kLanes);
        sum[r][b] = add(Partial ? load_n(a, n) : load(a), sum[r][b]);
      }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) {
      float *a = sums.to + at(r, sums.ld_to, i + b * kLanes);
      if (Partial)
        store_n(a, sum[r][b], n);
      else
        store(a, sum[r][b]);
    }
}

/// Calls f(begin, end) with the keys of each sum of a run.
template <typename F> MIXEDKV_INLINE void for_sums(int num_keys, F f) {
  for (int j = 0; j < num_keys; j += kSumKeys)
    f(j, num_keys - j < kSumKeys ? num_keys : j + kSumKeys);
}

/// Keys [begin, end): B vectors from dim i on; the last one only n lanes wide where n is not
/// kLanes. Ahead: rows are asked for before their turn.
template <int R, int B, bool Partial, bool Ahead, typename T>
MIXEDKV_INLINE void pv_vectors(const float *p, size_t ld_p, const Rows &v, int begin, int end,
                               int i, int n, const PvSums &sums) {
  f32v sum[R][B];
  begin_sums<R, B, Partial>(sums, i, n, sum);
  for (int j = begin; j < end; ++j) {
    const T *row = row_at<T>(v, j) + i;
    if constexpr (Ahead)
      ask_ahead(v, row, sizeof(T) * B * kLanes);
    f32v weight[R];
    for (int r = 0; r < R; ++r)
      weight[r] = set1(p[at(r, ld_p, j)]);
    for (int b = 0; b < B; ++b) {
      const f32v x = Partial ? load_n(row + b * kLanes, n) : load(row + b * kLanes);
      for (int r = 0; r < R; ++r)
        sum[r][b] = fma(weight[r], x, sum[r][b]);
    }
  }
  end_sums<R, B, Partial>(sums, i, n, sum);
}

/// Dims i to head_dim_v - 1, B vectors at a time, then half as many, and so on to the tail.
template <int R, int B, bool Ahead, typename T>
MIXEDKV_INLINE void pv_dims(const float *p, size_t ld_p, const Rows &v, int num_keys, int i,
                            int head_dim_v, const PvSums &sums) {
  for (; i + B * kLanes <= head_dim_v; i += B * kLanes)
    for_sums(num_keys, [&](int begin, int end) {
      pv_vectors<R, B, false, Ahead, T>(p, ld_p, v, begin, end, i, kLanes, sums);
    });
  if constexpr (B > 1)
    pv_dims<R, B / 2, Ahead, T>(p, ld_p, v, num_keys, i, head_dim_v, sums);
  else if (i < head_dim_v)
    for_sums(num_keys, [&](int begin, int end) {
      pv_vectors<R, 1, true, Ahead, T>(p, ld_p, v, begin, end, i, head_dim_v - i, sums);
    });
}

/// Vectors V to V + N - 1 of a block.
template <typename T, int V, int N>
MIXEDKV_INLINE void unpack_vectors(const Opened<T> &opened, f32v *x) {
  x[0] = BlockWords<T>::template vector<V>(opened);
  if constexpr (N > 1)
    unpack_vectors<T, V + 1, N - 1>(opened, x + 1);
}

/// Keys [begin, end): of NB blocks the vectors V to V + N - 1; all of them where there is more than
/// one block.
template <int R, int NB, int V, int N, typename T>
MIXEDKV_INLINE void pv_blocks(const float *p, size_t ld_p, const Rows &v, int begin, int end,
                              int block, const PvSums &sums) {
  constexpr int B = N * NB;
  const int i = block * kBlockValues + V * kLanes;
  f32v sum[R][B];
  begin_sums<R, B, false>(sums, i, kLanes, sum);
  for (int j = begin; j < end; ++j) {
    const T *row = row_at<T>(v, j);
    f32v x[B];
    for (int b = 0; b < NB; ++b)
      unpack_vectors<T, V, N>(open_part(row, block + b), x + b * N);
    for (int r = 0; r < R; ++r) {
      const f32v weight = set1(p[at(r, ld_p, j)]);
      for (int b = 0; b < B; ++b)
        sum[r][b] = fma(weight, x[b], sum[r][b]);
    }
  }
  end_sums<R, B, false>(sums, i, kLanes, sum);
}

/// From a block on, NB blocks at a time, then half as many, down to parts of a block: N vectors
/// from vector V on.
template <int R, int NB, int V, int N, typename T>
MIXEDKV_INLINE void pv_all_blocks(const float *p, size_t ld_p, const Rows &v, int num_keys,
                                  int block, int num_blocks, const PvSums &sums) {
  for (; block + NB <= num_blocks; block += NB)
    for_sums(num_keys, [&](int begin, int end) {
      pv_blocks<R, NB, V, N, T>(p, ld_p, v, begin, end, block, sums);
    });
  if constexpr (NB > 1)
    pv_all_blocks<R, NB / 2, V, N, T>(p, ld_p, v, num_keys, block, num_blocks, sums);
  else if constexpr (V + N < kVectors)
    pv_all_blocks<R, 1, V + N, N, T>(p, ld_p, v, num_keys, 0, num_blocks, sums);
}

template <int R, typename T>
void pv_rows(const float *p, size_t ld_p, const Rows &v, int num_keys, int head_dim_v,
             const PvSums &sums) noexcept {
  constexpr int B = value_tile(R, is_blocks<T>);
  if constexpr (is_blocks<T>)
    pv_all_blocks<R, (B > kVectors ? B / kVectors : 1), 0, (B > kVectors ? kVectors : B), T>(
        p, ld_p, v, num_keys, 0, head_dim_v / kBlockValues, sums);
  else
    pv_dims<R, B, true, T>(p, ld_p, v, num_keys, 0, head_dim_v, sums);
}

template <typename T, int R = kRows>
MIXEDKV_INLINE void pv_tile(int num_rows, const float *p, size_t ld_p, const Rows &v, int num_keys,
                            int head_dim_v, const PvSums &sums) {
  if constexpr (R > 1)
    if (num_rows < R)
      return pv_tile<T, R - 1>(num_rows, p, ld_p, v, num_keys, head_dim_v, sums);
  pv_rows<R, T>(p, ld_p, v, num_keys, head_dim_v, sums);
}

template <typename T>
MIXEDKV_INLINE void pv_groups(const float *p, size_t ld_p, int num_rows, const Rows &v,
                              int num_keys, int head_dim_v, const PvSums &sums) {
  const int step = rows_of_group(num_rows);
  for (int r = 0; r < num_rows; r += step)
    pv_tile<T>(num_rows - r < step ? num_rows - r : step, p + at(r, ld_p, 0), ld_p, v, num_keys,
               head_dim_v, sums.rows(r));
}

template <typename T, int R = kRows>
MIXEDKV_INLINE void pv_tile_of_dims(int num_rows, const float *p, size_t ld_p, const Rows &v,
                                    int num_keys, int num_dims, const PvSums &sums) {
  if constexpr (R > 1)
    if (num_rows < R)
      return pv_tile_of_dims<T, R - 1>(num_rows, p, ld_p, v, num_keys, num_dims, sums);
  pv_dims<R, value_tile(R, false), false, T>(p, ld_p, v, num_keys, 0, num_dims, sums);
}

/// Many rows over values that need no unpacking: some dims of some keys at a time, which stay in
/// the first-level cache from group to group of rows. The fewer the dims, the more keys fit, and
/// the less often a group's sums are brought in. num_rows <= kMostRows.
template <typename T>
void pv_many(const float *p, size_t ld_p, int num_rows, const Rows &v, int num_keys, int head_dim_v,
             float *acc, size_t ld_acc) noexcept {
  constexpr int kDims = value_tile(kRows, false) * kLanes;
  constexpr int kKeys = kStackFloats / kDims;
  alignas(64) float stack[kMostRows * kDims];
  for (int i = 0; i < head_dim_v; i += kDims) {
    const int width = head_dim_v - i < kDims ? head_dim_v - i : kDims;
    for_sums(num_keys, [&](int begin, int end) {
      for (int j = begin; j < end; j += kKeys) {
        const int count = end - j < kKeys ? end - j : kKeys;
        Rows part = rows_from(v, j);
        part.base = static_cast<const T *>(part.base) + i;
        const PvSums sums =
            sums_of_part(j == begin, j + count == end, stack, kDims, acc + i, ld_acc);
        for (int r = 0; r < num_rows; r += kRows)
          pv_tile_of_dims<T>(num_rows - r < kRows ? num_rows - r : kRows, p + at(r, ld_p, j), ld_p,
                             part, count, width, sums.rows(r));
      }
    });
  }
}

template <typename T>
MIXEDKV_INLINE void pv_of(const float *p, size_t ld_p, int num_rows, const Rows *v, int num_keys,
                          int head_dim_v, float *acc, size_t ld_acc) {
  if (num_rows <= kRows || head_dim_v > kMaxUnpackedDim) {
    if (num_rows > 0)
      pv_groups<T>(p, ld_p, num_rows, *v, num_keys, head_dim_v, sums_to(acc, ld_acc));
    return;
  }
  if constexpr (!is_blocks<T>)
    if (num_rows >= kManyRows) {
      pv_many<T>(p, ld_p, num_rows, *v, num_keys, head_dim_v, acc, ld_acc);
      return;
    }
  alignas(64) float unpacked[kStackFloats];
  alignas(64) float stack[(kManyRows - 1) * kMaxUnpackedDim];
  const auto add_part = [&](int j, int count, const PvSums &sums) {
    Rows part = rows_from(*v, j);
    if constexpr (is_blocks<T>) {
      for (int c = 0; c < count; ++c)
        unpack_row(row_at<T>(part, c), unpacked + c * head_dim_v, head_dim_v);
      part = {unpacked, static_cast<ptrdiff_t>(sizeof(float)) * head_dim_v, nullptr};
    }
    pv_groups<Unpacked<T>>(p + j, ld_p, num_rows, part, count, head_dim_v, sums);
  };
  const int step = keys_on_stack(head_dim_v);
  for_sums(num_keys, [&](int begin, int end) {
    for (int j = begin; j < end; j += step) {
      const int count = end - j < step ? end - j : step;
      add_part(j, count,
               sums_of_part(j == begin, j + count == end, stack, static_cast<size_t>(head_dim_v),
                            acc, ld_acc));
    }
  });
}

template <typename T>
void pv_rows_of(const float *p, size_t ld_p, int num_rows, const Rows *v, int num_keys,
                int head_dim_v, float *acc, size_t ld_acc) noexcept {
  constexpr int kMost = is_blocks<T> ? kManyRows - 1 : kMostRows; // whose sums the stack holds
  for (int r = 0; r < num_rows; r += kMost)
    pv_of<T>(p + at(r, ld_p, 0), ld_p, num_rows - r < kMost ? num_rows - r : kMost, v, num_keys,
             head_dim_v, acc + at(r, ld_acc, 0), ld_acc);
}
