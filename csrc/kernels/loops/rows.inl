// A group of query rows against a run of keys, in the vocabulary of vocabulary/common.h.
//
// qk: a micro-tile of R query rows by C keys keeps one vector of partial sums for each pair, lanes
// are dims, and a key's values are loaded or unpacked once for the R rows. Four vectors at a time
// are added up to four scores by transposition. pv: lanes are dims; R rows by some vectors of acc
// stay in registers over the whole run of keys.
//
// What a score or an element of acc comes to does not depend on which tile it was computed in: the
// order of its additions follows from head_dim (qk) and from the order of keys (pv) alone. So a row
// gets the same bits however many rows come with it.
//
// Where there are more rows than a tile holds, they go over a few keys (values) at a time, group by
// group, so that these stay in the first-level cache; rows of blocks are unpacked to f32 on the
// stack first. Sums run over the values in their order whether they were unpacked or not.

template <typename T> MIXEDKV_INLINE const T *row_at(const Rows &rows, int j) {
  const ptrdiff_t row = rows.index ? rows.index[j] : j;
  return reinterpret_cast<const T *>(static_cast<const char *>(rows.base) + rows.stride * row);
}

/// The rows from row j on.
MIXEDKV_INLINE Rows rows_from(const Rows &rows, int j) {
  if (rows.index)
    return {rows.base, rows.stride, rows.index + j};
  return {static_cast<const char *>(rows.base) + rows.stride * j, rows.stride, nullptr};
}

enum : int { kStackFloats = 4096 }; // 16 KiB: leaves room in the smallest first-level caches
enum : int { kMaxUnpackedDim = 512 };
/// From so many rows on, values come from the first-level cache rather than from memory.
enum : int { kManyRows = 12 };
/// Rows whose sums of a run of values the stack holds, at most.
enum : int { kMostRows = 128 };

/// Rows are asked for this many bytes before their turn. Processors read ahead by themselves, but
/// stop at the ends of pages and start anew with each run of keys, which long contexts wait for.
enum : int { kAheadBytes = 16384 };

/// part: `bytes` of a row.
MIXEDKV_INLINE void ask_ahead(const Rows &rows, const void *part, size_t bytes) {
  if (rows.index || rows.stride <= 0)
    return; // who knows where the next rows are
  const ptrdiff_t ahead = (kAheadBytes + rows.stride - 1) / rows.stride * rows.stride;
  // As a number: the address may lie behind the end of everything, which a hint may.
  const uintptr_t begin = reinterpret_cast<uintptr_t>(part) + static_cast<uintptr_t>(ahead);
  for (size_t i = 0; i < bytes; i += 64)
    prefetch(reinterpret_cast<const void *>(begin + i));
}

/// Rows of blocks as f32, but for the sign of zeros and the like (blocks.inl).
template <typename T> MIXEDKV_INLINE void unpack_row(const T *x, float *y, int n) {
  for (int b = 0; b < n / kBlockValues; ++b)
    store_block<T, false>(open_part(x, b), y + b * kBlockValues);
}
/// What rows of T are read as once they are on the stack. Halves stay as they are: converting them
/// in a load costs less than a store and a second load.
template <typename T, bool Blocks = is_blocks<T>> struct UnpackedAs { using Type = T; };
template <typename T> struct UnpackedAs<T, true> { using Type = float; };
template <typename T> using Unpacked = typename UnpackedAs<T>::Type;

MIXEDKV_INLINE size_t at(int row, size_t ld, int column) {
  return static_cast<size_t>(row) * ld + static_cast<size_t>(column);
}

// --- qk ----------------------------------------------------------------------------------------

template <int R, int C, typename T>
MIXEDKV_INLINE void add_products(const float *q, size_t ld_q, const T *const (&keys)[C],
                                 int head_dim, f32v (&sum)[R][C]) {
  int i = 0;
  for (; i + kLanes <= head_dim; i += kLanes) {
    f32v k[C];
    for (int c = 0; c < C; ++c)
      k[c] = load(keys[c] + i);
    for (int r = 0; r < R; ++r) {
      const f32v x = load(q + at(r, ld_q, i));
      for (int c = 0; c < C; ++c)
        sum[r][c] = fma(x, k[c], sum[r][c]);
    }
  }
  if (i < head_dim) {
    const int n = head_dim - i;
    f32v k[C];
    for (int c = 0; c < C; ++c)
      k[c] = load_n(keys[c] + i, n);
    for (int r = 0; r < R; ++r) {
      const f32v x = load_n(q + at(r, ld_q, i), n);
      for (int c = 0; c < C; ++c)
        sum[r][c] = fma(x, k[c], sum[r][c]);
    }
  }
}

/// One block of G keys from key c on, vector by vector. (Recursion over keys as well, in place of a
/// loop, changed nothing on AVX and made NEON spill.)
template <typename T, int V, int G, int R, int C>
MIXEDKV_INLINE void add_block_vectors(const float *q, size_t ld_q, const Opened<T> (&blocks)[G],
                                      int c, f32v (&sum)[R][C]) {
  f32v k[G];
  for (int g = 0; g < G; ++g)
    k[g] = BlockWords<T>::template vector<V>(blocks[g]);
  for (int r = 0; r < R; ++r) {
    const f32v x = load(q + at(r, ld_q, V * kLanes));
    for (int g = 0; g < G; ++g)
      sum[r][c + g] = fma(x, k[g], sum[r][c + g]);
  }
  if constexpr ((V + 1) * kLanes < kBlockValues)
    add_block_vectors<T, V + 1>(q, ld_q, blocks, c, sum);
}

template <int R, int C, typename T>
MIXEDKV_INLINE void add_block_products(const float *q, size_t ld_q, const T *const (&keys)[C],
                                       int head_dim, f32v (&sum)[R][C]) {
  constexpr int G = C < kOpenKeys ? C : kOpenKeys;
  static_assert(C % G == 0, "whole groups of keys");
  for (int b = 0; b < head_dim / kBlockValues; ++b)
    for (int c = 0; c < C; c += G) {
      Opened<T> blocks[G];
      for (int g = 0; g < G; ++g)
        blocks[g] = open_part(keys[c + g], b);
      add_block_vectors<T, 0>(q + b * kBlockValues, ld_q, blocks, c, sum);
    }
}

template <typename T> MIXEDKV_INLINE size_t bytes_of_row(int n) {
  return static_cast<size_t>(n) / (is_blocks<T> ? kBlockValues * kParts<T> : 1) * sizeof(T);
}

template <int R, typename T>
void qk_rows(const float *q, size_t ld_q, const Rows &k, int num_keys, int head_dim, float *scores,
             size_t ld_scores) noexcept {
  constexpr int C = key_tile(R, is_blocks<T>);
  static_assert(R * C % 4 == 0, "scores are added up in fours");
  for (int j = 0; j < num_keys; j += C) {
    const int count = num_keys - j < C ? num_keys - j : C;
    const T *keys[C];
    for (int c = 0; c < C; ++c) // a short last tile computes its last key several times
      keys[c] = row_at<T>(k, j + (c < count ? c : count - 1));
    for (int c = 0; c < C; ++c)
      ask_ahead(k, keys[c], bytes_of_row<T>(head_dim));
    f32v sum[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c)
        sum[r][c] = zero();
    if constexpr (is_blocks<T>)
      add_block_products(q, ld_q, keys, head_dim, sum);
    else
      add_products(q, ld_q, keys, head_dim, sum);
    if (C % 4 == 0 && count == C) {
      for (int r = 0; r < R; ++r)
        for (int c = 0; c + 3 < C; c += 4)
          sum4(scores + at(r, ld_scores, j + c), sum[r][c], sum[r][c + 1], sum[r][c + 2],
               sum[r][c + 3]);
    } else {
      float tile[R * C];
      const f32v *flat = sum[0];
      for (int s = 0; s < R * C; s += 4)
        sum4(tile + s, flat[s], flat[s + 1], flat[s + 2], flat[s + 3]);
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < count; ++c)
          scores[at(r, ld_scores, j + c)] = tile[r * C + c];
    }
  }
}

template <typename T, int R = kRows>
MIXEDKV_INLINE void qk_tile(int num_rows, const float *q, size_t ld_q, const Rows &k, int num_keys,
                            int head_dim, float *scores, size_t ld_scores) {
  if constexpr (R > 1)
    if (num_rows < R)
      return qk_tile<T, R - 1>(num_rows, q, ld_q, k, num_keys, head_dim, scores, ld_scores);
  qk_rows<R, T>(q, ld_q, k, num_keys, head_dim, scores, ld_scores);
}

/// Rows of a group, of num_rows cut into as few and as even groups as possible.
MIXEDKV_INLINE int rows_of_group(int num_rows) {
  const int groups = (num_rows + kRows - 1) / kRows;
  return (num_rows + groups - 1) / groups;
}

template <typename T>
MIXEDKV_INLINE void qk_groups(const float *q, size_t ld_q, int num_rows, const Rows &k,
                              int num_keys, int head_dim, float *scores, size_t ld_scores) {
  const int step = rows_of_group(num_rows);
  for (int r = 0; r < num_rows; r += step)
    qk_tile<T>(num_rows - r < step ? num_rows - r : step, q + at(r, ld_q, 0), ld_q, k, num_keys,
               head_dim, scores + at(r, ld_scores, 0), ld_scores);
}

/// Keys that fit on the stack, in whole tiles.
MIXEDKV_INLINE int keys_on_stack(int head_dim) { return kStackFloats / head_dim / 8 * 8; }

template <typename T>
MIXEDKV_INLINE void qk_of(const float *q, size_t ld_q, int num_rows, const Rows *k, int num_keys,
                          int head_dim, float *scores, size_t ld_scores) {
  if (num_rows <= kRows || head_dim > kMaxUnpackedDim) {
    if (num_rows > 0)
      qk_groups<T>(q, ld_q, num_rows, *k, num_keys, head_dim, scores, ld_scores);
    return;
  }
  alignas(64) float unpacked[kStackFloats];
  const int step = keys_on_stack(head_dim);
  for (int j = 0; j < num_keys; j += step) {
    const int count = num_keys - j < step ? num_keys - j : step;
    Rows part = rows_from(*k, j);
    if constexpr (is_blocks<T>) {
      for (int c = 0; c < count; ++c)
        unpack_row(row_at<T>(part, c), unpacked + c * head_dim, head_dim);
      part = {unpacked, static_cast<ptrdiff_t>(sizeof(float)) * head_dim, nullptr};
    }
    qk_groups<Unpacked<T>>(q, ld_q, num_rows, part, count, head_dim, scores + j, ld_scores);
  }
}

template <typename T>
void qk_rows_of(const float *q, size_t ld_q, int num_rows, const Rows *k, int num_keys,
                int head_dim, float *scores, size_t ld_scores) noexcept {
  qk_of<T>(q, ld_q, num_rows, k, num_keys, head_dim, scores, ld_scores);
}
