// Many query rows against keys that lie side by side, [head_dim][kTileTokens] f32 a tile: the
// inner loop of a matrix product, R rows by C vectors of tokens, without a sum across a vector.
// Bringing keys into that form costs a transposition, which some eight rows pay for.

enum : int { kTileVectors = kTileTokens / kLanes };

/// Tiles that sums are held of beside kRows rows.
constexpr int kTransposedTiles = kLanes == 16 ? 4 : 1;

template <int R, int T>
MIXEDKV_INLINE void transposed_scores(const float *q, size_t ld_q, const float *kt, int head_dim,
                                      float *scores, size_t ld_scores) {
  constexpr int C = T * kTileVectors;
  const float *tiles[T];
  for (int t = 0; t < T; ++t)
    tiles[t] = kt + static_cast<size_t>(t) * static_cast<size_t>(head_dim) * kTileTokens;
  f32v sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      sum[r][c] = zero();
  for (int i = 0; i < head_dim; ++i) {
    f32v k[C];
    for (int c = 0; c < C; ++c)
      k[c] = load(tiles[c / kTileVectors] + i * kTileTokens + c % kTileVectors * kLanes);
    for (int r = 0; r < R; ++r) {
      const f32v x = set1(q[at(r, ld_q, i)]);
      for (int c = 0; c < C; ++c)
        sum[r][c] = fma(x, k[c], sum[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      store(scores + at(r, ld_scores, c * kLanes), sum[r][c]);
}

template <int R = kRows>
MIXEDKV_INLINE void qk_transposed_rows(int num_rows, const float *q, size_t ld_q, const float *kt,
                                       int num_tiles, int head_dim, float *scores,
                                       size_t ld_scores) {
  if constexpr (R > 1)
    if (num_rows < R)
      return qk_transposed_rows<R - 1>(num_rows, q, ld_q, kt, num_tiles, head_dim, scores,
                                       ld_scores);
  const size_t tile = static_cast<size_t>(head_dim) * kTileTokens;
  int t = 0;
  for (; t + kTransposedTiles <= num_tiles; t += kTransposedTiles)
    transposed_scores<R, kTransposedTiles>(q, ld_q, kt + static_cast<size_t>(t) * tile, head_dim,
                                           scores + t * kTileTokens, ld_scores);
  for (; t < num_tiles; ++t)
    transposed_scores<R, 1>(q, ld_q, kt + static_cast<size_t>(t) * tile, head_dim,
                            scores + t * kTileTokens, ld_scores);
}

void qk_transposed(const float *q, size_t ld_q, int num_rows, const float *kt, int num_tiles,
                   int head_dim, float *scores, size_t ld_scores) noexcept {
  if (num_rows == 0)
    return;
  const int step = rows_of_group(num_rows);
  for (int r = 0; r < num_rows; r += step)
    qk_transposed_rows<>(num_rows - r < step ? num_rows - r : step, q + at(r, ld_q, 0), ld_q, kt,
                         num_tiles, head_dim, scores + at(r, ld_scores, 0), ld_scores);
}

MIXEDKV_INLINE void unpack_row(const f16_t *x, float *y, int n) {
  f16_to_f32(x, y, static_cast<size_t>(n));
}
MIXEDKV_INLINE void unpack_row(const bf16_t *x, float *y, int n) {
  bf16_row_to(x, y, static_cast<size_t>(n));
}
MIXEDKV_INLINE void unpack_row(const float *x, float *y, int n) {
  memcpy(y, x, static_cast<size_t>(n) * sizeof(float));
}

/// Where dim `begin` of a row of T starts, counted in T.
template <typename T> MIXEDKV_INLINE const T *from_dim(const T *row, int begin) {
  return row + begin / (is_blocks<T> ? kBlockValues * kParts<T> : 1);
}

template <typename T>
void transpose_keys(const Rows *k, int num_keys, int head_dim, float *kt) noexcept {
  // A stretch of dims at a time, whose f32 rows fit on the stack whatever head_dim is.
  constexpr int kStretch = 128;
  alignas(64) float rows[kTileTokens][kStretch];
  for (int begin = 0; begin < head_dim; begin += kStretch) {
    const int n = head_dim - begin < kStretch ? head_dim - begin : kStretch;
    for (int j = 0; j < kTileTokens; ++j) {
      if (j < num_keys)
        unpack_row(from_dim(row_at<T>(*k, j), begin), rows[j], n);
      else
        memset(rows[j], 0, sizeof rows[j]);
    }
    float *out = kt + begin * kTileTokens;
    int i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (int j = 0; j < kTileTokens; j += kLanes) {
        f32v x[kLanes];
        for (int l = 0; l < kLanes; ++l)
          x[l] = load(rows[j + l] + i);
        transpose(x);
        for (int l = 0; l < kLanes; ++l)
          store(out + (i + l) * kTileTokens + j, x[l]);
      }
    for (; i < n; ++i)
      for (int j = 0; j < kTileTokens; ++j)
        out[i * kTileTokens + j] = rows[j][i];
  }
}
