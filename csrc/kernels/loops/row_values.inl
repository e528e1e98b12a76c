// Rows of values, weighted and added up for a group of query rows; what holds for keys (rows.inl)
// holds here.

/// B vectors of acc from dim i on; the last one only n lanes wide where n is not kLanes. Ahead:
/// rows are asked for before their turn.
template <int R, int B, bool Partial, bool Ahead, typename T>
MIXEDKV_INLINE void pv_vectors(const float *p, size_t ld_p, const Rows &v, int num_keys, int i,
                               int n, float *acc, size_t ld_acc) {
  f32v sum[R][B];
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) {
      const float *a = acc + at(r, ld_acc, i + b * kLanes);
      sum[r][b] = Partial ? load_n(a, n) : load(a);
    }
  for (int j = 0; j < num_keys; ++j) {
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
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) {
      float *a = acc + at(r, ld_acc, i + b * kLanes);
      if (Partial)
        store_n(a, sum[r][b], n);
      else
        store(a, sum[r][b]);
    }
}

/// Dims i to head_dim_v - 1, B vectors at a time, then half as many, and so on to the tail.
template <int R, int B, bool Ahead, typename T>
MIXEDKV_INLINE void pv_dims(const float *p, size_t ld_p, const Rows &v, int num_keys, int i,
                            int head_dim_v, float *acc, size_t ld_acc) {
  for (; i + B * kLanes <= head_dim_v; i += B * kLanes)
    pv_vectors<R, B, false, Ahead, T>(p, ld_p, v, num_keys, i, kLanes, acc, ld_acc);
  if constexpr (B > 1)
    pv_dims<R, B / 2, Ahead, T>(p, ld_p, v, num_keys, i, head_dim_v, acc, ld_acc);
  else if (i < head_dim_v)
    pv_vectors<R, 1, true, Ahead, T>(p, ld_p, v, num_keys, i, head_dim_v - i, acc, ld_acc);
}

/// Vectors V to V + N - 1 of a block.
template <typename T, int V, int N>
MIXEDKV_INLINE void unpack_vectors(const Opened<T> &opened, f32v *x) {
  x[0] = BlockWords<T>::template vector<V>(opened);
  if constexpr (N > 1)
    unpack_vectors<T, V + 1, N - 1>(opened, x + 1);
}

/// Of NB blocks the vectors V to V + N - 1; all of them where there is more than one block.
template <int R, int NB, int V, int N, typename T>
MIXEDKV_INLINE void pv_blocks(const float *p, size_t ld_p, const Rows &v, int num_keys, int block,
                              float *acc, size_t ld_acc) {
  constexpr int B = N * NB;
  const int i = block * kBlockValues + V * kLanes;
  f32v sum[R][B];
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b)
      sum[r][b] = load(acc + at(r, ld_acc, i + b * kLanes));
  for (int j = 0; j < num_keys; ++j) {
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
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b)
      store(acc + at(r, ld_acc, i + b * kLanes), sum[r][b]);
}

/// From a block on, NB blocks at a time, then half as many, down to parts of a block: N vectors
/// from vector V on.
template <int R, int NB, int V, int N, typename T>
MIXEDKV_INLINE void pv_all_blocks(const float *p, size_t ld_p, const Rows &v, int num_keys,
                                  int block, int num_blocks, float *acc, size_t ld_acc) {
  for (; block + NB <= num_blocks; block += NB)
    pv_blocks<R, NB, V, N, T>(p, ld_p, v, num_keys, block, acc, ld_acc);
  if constexpr (NB > 1)
    pv_all_blocks<R, NB / 2, V, N, T>(p, ld_p, v, num_keys, block, num_blocks, acc, ld_acc);
  else if constexpr (V + N < kVectors)
    pv_all_blocks<R, 1, V + N, N, T>(p, ld_p, v, num_keys, 0, num_blocks, acc, ld_acc);
}

template <int R, typename T>
void pv_rows(const float *p, size_t ld_p, const Rows &v, int num_keys, int head_dim_v, float *acc,
             size_t ld_acc) noexcept {
  constexpr int B = value_tile(R, is_blocks<T>);
  if constexpr (is_blocks<T>)
    pv_all_blocks<R, (B > kVectors ? B / kVectors : 1), 0, (B > kVectors ? kVectors : B), T>(
        p, ld_p, v, num_keys, 0, head_dim_v / kBlockValues, acc, ld_acc);
  else
    pv_dims<R, B, true, T>(p, ld_p, v, num_keys, 0, head_dim_v, acc, ld_acc);
}

template <typename T, int R = kRows>
MIXEDKV_INLINE void pv_tile(int num_rows, const float *p, size_t ld_p, const Rows &v, int num_keys,
                            int head_dim_v, float *acc, size_t ld_acc) {
  if constexpr (R > 1)
    if (num_rows < R)
      return pv_tile<T, R - 1>(num_rows, p, ld_p, v, num_keys, head_dim_v, acc, ld_acc);
  pv_rows<R, T>(p, ld_p, v, num_keys, head_dim_v, acc, ld_acc);
}

template <typename T>
MIXEDKV_INLINE void pv_groups(const float *p, size_t ld_p, int num_rows, const Rows &v,
                              int num_keys, int head_dim_v, float *acc, size_t ld_acc) {
  const int step = rows_of_group(num_rows);
  for (int r = 0; r < num_rows; r += step)
    pv_tile<T>(num_rows - r < step ? num_rows - r : step, p + at(r, ld_p, 0), ld_p, v, num_keys,
               head_dim_v, acc + at(r, ld_acc, 0), ld_acc);
}

template <typename T, int R = kRows>
MIXEDKV_INLINE void pv_tile_of_dims(int num_rows, const float *p, size_t ld_p, const Rows &v,
                                    int num_keys, int begin, int end, float *acc, size_t ld_acc) {
  if constexpr (R > 1)
    if (num_rows < R)
      return pv_tile_of_dims<T, R - 1>(num_rows, p, ld_p, v, num_keys, begin, end, acc, ld_acc);
  pv_dims<R, value_tile(R, false), false, T>(p, ld_p, v, num_keys, begin, end, acc, ld_acc);
}

/// Many rows over values that need no unpacking: some dims of some keys at a time, which stay in
/// the first-level cache from group to group of rows. The fewer the dims, the more keys fit, and
/// the less often a group's sums are brought in.
template <typename T>
void pv_many(const float *p, size_t ld_p, int num_rows, const Rows &v, int num_keys, int head_dim_v,
             float *acc, size_t ld_acc) noexcept {
  constexpr int kDims = value_tile(kRows, false) * kLanes;
  constexpr int kKeys = kStackFloats / kDims;
  for (int i = 0; i < head_dim_v; i += kDims) {
    const int end = head_dim_v - i < kDims ? head_dim_v : i + kDims;
    for (int j = 0; j < num_keys; j += kKeys) {
      const Rows part = rows_from(v, j);
      const int count = num_keys - j < kKeys ? num_keys - j : kKeys;
      for (int r = 0; r < num_rows; r += kRows)
        pv_tile_of_dims<T>(num_rows - r < kRows ? num_rows - r : kRows, p + at(r, ld_p, j), ld_p,
                           part, count, i, end, acc + at(r, ld_acc, 0), ld_acc);
    }
  }
}

template <typename T>
MIXEDKV_INLINE void pv_of(const float *p, size_t ld_p, int num_rows, const Rows *v, int num_keys,
                          int head_dim_v, float *acc, size_t ld_acc) {
  if (num_rows <= kRows || head_dim_v > kMaxUnpackedDim) {
    if (num_rows > 0)
      pv_groups<T>(p, ld_p, num_rows, *v, num_keys, head_dim_v, acc, ld_acc);
    return;
  }
  if constexpr (!is_blocks<T>)
    if (num_rows >= kManyRows) {
      pv_many<T>(p, ld_p, num_rows, *v, num_keys, head_dim_v, acc, ld_acc);
      return;
    }
  alignas(64) float unpacked[kStackFloats];
  const int step = keys_on_stack(head_dim_v);
  for (int j = 0; j < num_keys; j += step) {
    const int count = num_keys - j < step ? num_keys - j : step;
    Rows part = rows_from(*v, j);
    if constexpr (is_blocks<T>) {
      for (int c = 0; c < count; ++c)
        unpack_row(row_at<T>(part, c), unpacked + c * head_dim_v, head_dim_v);
      part = {unpacked, static_cast<ptrdiff_t>(sizeof(float)) * head_dim_v, nullptr};
    }
    pv_groups<Unpacked<T>>(p + j, ld_p, num_rows, part, count, head_dim_v, acc, ld_acc);
  }
}

template <typename T>
void pv_rows_of(const float *p, size_t ld_p, int num_rows, const Rows *v, int num_keys,
                int head_dim_v, float *acc, size_t ld_acc) noexcept {
  pv_of<T>(p, ld_p, num_rows, v, num_keys, head_dim_v, acc, ld_acc);
}
