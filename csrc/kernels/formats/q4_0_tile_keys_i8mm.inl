// Packed Q4_0 keys against a group of query rows with smmla (FEAT_I8MM), in place of
// tile_keys.inl's qk_tiles. It multiplies two rows of eight bytes by two others: two tokens by a
// query row's high bytes and its low ones, whose products are wanted side by side anyway. That is
// twice as many products an instruction as sdot has, 8 for a block of four tokens and a query row
// instead of 16, for four zips a block that all rows share.

enum : int { kDimsOfMatrix = 8, kTokensAtOnce = 4, kTokenVectors = 2 };

/// As tile_keys.inl's, but eight high bytes and the eight low bytes of the same dims in turns.
void prepare_tile_query_i8mm(const float *q, size_t ld_q, int num_rows, int head_dim,
                             float *prepared) noexcept {
  prepare_tile_query<Q4_0Keys>(q, ld_q, num_rows, head_dim, prepared);
  for (int r = 0; r < num_rows; ++r) {
    i32 *row = reinterpret_cast<i32 *>(prepared + static_cast<size_t>(r) * prepared_row(head_dim));
    for (int b = 0; b < head_dim / QK4_0; ++b, row += kPreparedBlock) {
      int8_t *bytes = reinterpret_cast<int8_t *>(row);
      int8_t both[2 * QK4_0];
      memcpy(both, bytes, sizeof both);
      for (int i = 0; i < QK4_0; i += kDimsOfMatrix) {
        memcpy(bytes + 2 * i, both + i, kDimsOfMatrix);
        memcpy(bytes + 2 * i + kDimsOfMatrix, both + QK4_0 + i, kDimsOfMatrix);
      }
    }
  }
}

/// Nibbles of a block of four tokens: [dims / 8][tokens / 2], two tokens of eight dims each.
using TokenMatrices = int8x16_t[QK4_0 / kDimsOfMatrix][2];

MIXEDKV_INLINE void open_tokens(const uint8_t *words, TokenMatrices &x) {
  for (int w = 0; w < kWordsOfBlock / 2; w += 2) {
    const i32v a = load_i32(words + w * kTileTokens * 4);
    const i32v b = load_i32(words + (w + 1) * kTileTokens * 4);
    const i32v pairs[2] = {vzip1q_s32(a, b), vzip2q_s32(a, b)};
    for (int p = 0; p < 2; ++p) {
      x[w / 2][p] = vreinterpretq_s8_s32(low_nibbles(pairs[p]));
      x[w / 2 + 2][p] = vreinterpretq_s8_s32(high_nibbles(pairs[p]));
    }
  }
}

/// Scores of R rows against kTokenVectors times four tokens of a tile, from `token` on.
template <int R>
MIXEDKV_INLINE void scores_i8mm(const i32 *q, size_t ld_q, const uint8_t *tile, int token,
                                int num_blocks, float *scores, size_t ld_scores) {
  f32v sum[R][kTokenVectors];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kTokenVectors; ++v)
      sum[r][v] = zero();
  for (int b = 0; b < num_blocks; ++b) {
    TokenMatrices x[kTokenVectors];
    f32v d[kTokenVectors];
    for (int v = 0; v < kTokenVectors; ++v) {
      const int first = token + v * kTokensAtOnce;
      open_tokens(tile + b * kNibbleBlockBytes + first * 4, x[v]);
      d[v] = load(nibble_scale(tile, num_blocks, b, first));
    }
    for (int r = 0; r < R; ++r) {
      const i32 *row = q + static_cast<size_t>(r) * ld_q + b * kPreparedBlock;
      int32x4_t acc[kTokenVectors][2];
      for (int v = 0; v < kTokenVectors; ++v)
        acc[v][0] = acc[v][1] = zero_i32();
      for (int m = 0; m < QK4_0 / kDimsOfMatrix; ++m) {
        const int8x16_t y = vreinterpretq_s8_s32(load_i32(row + m * 4));
        for (int v = 0; v < kTokenVectors; ++v)
          for (int p = 0; p < 2; ++p)
            acc[v][p] = vmmlaq_s32(acc[v][p], x[v][m][p], y);
      }
      float s;
      memcpy(&s, row + kNumberWords + 1, sizeof s);
      const i32v offset = set1_i32(row[kNumberWords]);
      for (int v = 0; v < kTokenVectors; ++v) {
        const i32v hi = vuzp1q_s32(acc[v][0], acc[v][1]);
        const i32v lo = vuzp2q_s32(acc[v][0], acc[v][1]);
        const i32v total = add_i32(add_i32(lo, offset), shift_left<7>(hi));
        sum[r][v] = fma(to_f32(total), mul(d[v], set1(s)), sum[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kTokenVectors; ++v)
      store(scores + at(r, ld_scores, v * kTokensAtOnce), sum[r][v]);
}

template <int R>
void qk_tiles_rows_i8mm(const i32 *q, size_t ld_q, const Rows &tiles, int num_tiles, int num_blocks,
                        float *scores, size_t ld_scores) noexcept {
  const ptrdiff_t tile_bytes = num_blocks * (kNibbleBlockBytes + kTileScaleBytes);
  for (int t = 0; t < num_tiles; ++t) {
    prefetch_tile(tiles, num_tiles, t + kTilesAsked, 0, tile_bytes);
    for (int token = 0; token < kTileTokens; token += kTokenVectors * kTokensAtOnce)
      scores_i8mm<R>(q, ld_q, tile_at(tiles, t), token, num_blocks,
                     scores + t * kTileTokens + token, ld_scores);
  }
}

void qk_tiles_i8mm(const float *prepared, int num_rows, const Rows *tiles, int num_tiles,
                   int head_dim, float *scores, size_t ld_scores) noexcept {
  const size_t ld = prepared_row(head_dim);
  for (int r = 0; r < num_rows; r += kPackedRows) {
    const i32 *q = reinterpret_cast<const i32 *>(prepared + static_cast<size_t>(r) * ld);
    const auto run = num_rows - r == 1   ? qk_tiles_rows_i8mm<1>
                     : num_rows - r == 2 ? qk_tiles_rows_i8mm<2>
                     : num_rows - r == 3 ? qk_tiles_rows_i8mm<3>
                                         : qk_tiles_rows_i8mm<kPackedRows>;
    run(q, ld, *tiles, num_tiles, head_dim / QK4_0, scores + at(r, ld_scores, 0), ld_scores);
  }
}

constexpr TileKernels make_tiles_q4_0_i8mm() {
  TileKernels k = make_tiles_q4_0();
  k.prepare_query = prepare_tile_query_i8mm;
  k.qk = qk_tiles_i8mm;
  return k;
}

constexpr TileKernels tiles_q4_0_i8mm = make_tiles_q4_0_i8mm();
