// Packed Q4_0 values (formats/nibble_tile.h), weighted and added up for a group of query rows, in
// integers.
//
// Lanes are dims. A row's weights p * d of a block's tokens are rounded to 16 bits relative to the
// largest of the run (8 bits would cost 4e-2), pairs of tokens are multiplied and added at a time;
// sums are exact and are scaled and added to acc once a run. Relative to the largest |d| alone
// would not do: a token with large values that hardly counts would round the others away.
//
// Nibbles are not brought to the bottom of their halves: of each byte the low one counts once, the
// high one 16 times, in sums of their own, and what makes them unsigned is taken off at the start.
// So four pairs of nibbles cost one shift beside the masks, which most processors do twice as
// often.

enum : int {
  /// Tokens whose weights are held at a time. int32 sums can't overflow: 2^15 * 240 * 128.
  kPvTiles = 16,
  kPvTokens = kPvTiles * kTileTokens,
};

/// A row's weights of a run's tokens for one block of values, times scale.
struct PvWeights {
  alignas(64) int16_t numbers[kPvTokens];
  float scale;
  /// -8 times their sum: what nibbles from 0 to 15 add too much.
  i32 offset;
};

/// Weights of blocks b to b + B - 1. False where a product is not finite, which leaves them
/// undefined. With Hide, tokens that a row does not see may hold anything; otherwise they count.
/// Several blocks at a time, so that the largest of one is found while another is waited for.
template <int R, int B, bool Hide>
bool make_weights(const float *p, size_t ld_p, const Rows &tiles, int num_tiles, int num_blocks,
                  int b, PvWeights (&weights)[B][R]) noexcept {
  alignas(64) float scales[B][kPvTokens];
  for (int i = 0; i < num_tiles; ++i) {
    const f16_t *d = nibble_scale(tile_at(tiles, i), num_blocks, b, 0);
    for (int j = 0; j < B * kTileTokens; j += kLanes)
      store(scales[j / kTileTokens] + i * kTileTokens + j % kTileTokens, load(d + j));
  }
  const auto products = [&](int t, int block, f32v(&x)[R]) {
    const f32v d = load(scales[block] + t);
    for (int r = 0; r < R; ++r) {
      const f32v weight = load(p + at(r, ld_p, t));
      x[r] = mul(weight, d);
      if (Hide)
        x[r] = select_below(zero(), weight, x[r], zero());
    }
  };
  const int num_tokens = num_tiles * kTileTokens;
  f32v largest[B][R];
  for (int block = 0; block < B; ++block)
    for (int r = 0; r < R; ++r)
      largest[block][r] = zero();
  for (int t = 0; t < num_tokens; t += kLanes)
    for (int block = 0; block < B; ++block) {
      f32v x[R];
      products(t, block, x);
      for (int r = 0; r < R; ++r)
        largest[block][r] = max_bits(abs_of(x[r]), largest[block][r]);
    }
  float inverse[B][R];
  bool odd = false;
  for (int block = 0; block < B; ++block)
    for (int r = 0; r < R; ++r) {
      constexpr float kLargest = 32767.0f;
      odd |= any_not_finite(largest[block][r]);
      const float top = max_lanes(largest[block][r]);
      // What is too small to be inverted contributes nothing that f32 sums could show.
      const bool useful = top > 1e-30f;
      inverse[block][r] = useful ? kLargest / top : 0.0f;
      weights[block][r].scale = useful ? top * (1.0f / kLargest) : 0.0f;
    }
  if (odd)
    return false;
  for (int block = 0; block < B; ++block) {
    i32v sum[R];
    for (int r = 0; r < R; ++r)
      sum[r] = zero_i32();
    for (int t = 0; t < num_tokens; t += kLanes) {
      f32v x[R];
      products(t, block, x);
      for (int r = 0; r < R; ++r) {
        const i32v rounded = to_i32(mul(x[r], set1(inverse[block][r])));
        sum[r] = add_i32(sum[r], rounded);
        store_halves(weights[block][r].numbers + t, rounded);
      }
    }
    for (int r = 0; r < R; ++r)
      weights[block][r].offset = -8 * sum_lanes(sum[r]);
  }
  return true;
}

/// Adds the pairs of tokens of four bytes' low (High: high) nibbles: the K-th pair of eight tokens
/// and the one two further.
template <int K, int R, int N>
MIXEDKV_INLINE void add_pairs(const i32v (&x)[N], const PvWeights (&weights)[R], int token,
                              i32v (&sum)[R][N]) {
  const i32v mask = set1_i32(K % 2 == 0 ? 0x000f000f : 0x00f000f0);
  i32v pairs[N];
  for (int n = 0; n < N; ++n)
    pairs[n] = and_i32(x[n], mask);
  for (int r = 0; r < R; ++r) {
    i32 both;
    memcpy(&both, weights[r].numbers + token + 2 * K, sizeof both);
    const i32v y = set1_i32(both);
    for (int n = 0; n < N; ++n)
      sum[r][n] = madd16(sum[r][n], pairs[n], y);
  }
}

/// N vectors of dims of a block, from dim i of the head on.
template <int R, int N>
MIXEDKV_INLINE void pv_tiles_dims(const PvWeights (&weights)[R], const Rows &tiles, int num_tiles,
                                  size_t group_bytes, int i, float *acc, size_t ld_acc) {
  const i32v signs = set1_i32(static_cast<i32>(0x88888888u));
  i32v low[R][N], high[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) {
      low[r][n] = set1_i32(weights[r].offset);
      high[r][n] = zero_i32();
    }
  for (int t = 0; t < num_tiles; ++t) {
    const uint8_t *words = tile_at(tiles, t) + i * 4;
    for (int g = 0; g < 2; ++g, words += group_bytes) {
      const int token = t * kTileTokens + g * 8;
      i32v x[N];
      for (int n = 0; n < N; ++n)
        x[n] = xor_i32(load_i32(words + n * kLanes * 4), signs);
      add_pairs<0>(x, weights, token, low);
      add_pairs<1>(x, weights, token, high);
      for (int n = 0; n < N; ++n)
        x[n] = high_bytes(x[n]);
      add_pairs<2>(x, weights, token, low);
      add_pairs<3>(x, weights, token, high);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) {
      const i32v total = add_i32(low[r][n], shift_right_signed<4>(high[r][n]));
      float *a = acc + at(r, ld_acc, i + n * kLanes);
      store(a, fma(to_f32(total), set1(weights[r].scale), load(a)));
    }
}

/// Block b of R rows.
template <int R>
void pv_tiles_block(const PvWeights (&weights)[R], const Rows &tiles, int num_tiles, int num_blocks,
                    int b, float *acc, size_t ld_acc) noexcept {
  // The next run's tiles, a share with every block.
  constexpr ptrdiff_t bytes = kNibbleBlockBytes + kTileScaleBytes;
  for (int t = 0; t < num_tiles; ++t)
    prefetch_tile(tiles, num_tiles, num_tiles + t, b * bytes, bytes);
  constexpr int N = kValueVectors;
  const size_t group_bytes = static_cast<size_t>(num_blocks) * QK4_0 * 4;
  for (int i = b * QK4_0; i < (b + 1) * QK4_0; i += N * kLanes)
    pv_tiles_dims<R, N>(weights, tiles, num_tiles, group_bytes, i, acc, ld_acc);
}

/// One row and one block of values whose products are not all finite, value by value.
void pv_tiles_odd(const float *p, const Rows &tiles, int num_tiles, int num_blocks, int block,
                  float *acc) noexcept {
  for (int t = 0; t < num_tiles * kTileTokens; ++t) {
    if (p[t] == 0.0f)
      continue; // unseen, and it must stay so
    const uint8_t *tile = tile_at(tiles, t / kTileTokens);
    const int token = t % kTileTokens;
    float d[1];
    f16_to_f32(nibble_scale(tile, num_blocks, block, token), d, 1);
    for (int i = 0; i < QK4_0; ++i) {
      uint32_t word;
      memcpy(&word, tile + (token / 8 * num_blocks * QK4_0 + block * QK4_0 + i) * 4, 4);
      const int nibble = static_cast<int>((word >> nibble_shift(token) & 15u) ^ 8u) - 8;
      acc[block * QK4_0 + i] += p[t] * (static_cast<float>(nibble) * d[0]);
    }
  }
}

/// Block b of R rows where a product is not finite. A row's result follows from what it sees
/// itself, whatever the others see.
template <int R>
void pv_tiles_careful(const float *p, size_t ld_p, const Rows &tiles, int num_tiles, int num_blocks,
                      int b, float *acc, size_t ld_acc) noexcept {
  for (int r = 0; r < R; ++r) {
    PvWeights weights[1][1];
    const float *row = p + at(r, ld_p, 0);
    float *out = acc + at(r, ld_acc, 0);
    if (make_weights<1, 1, true>(row, ld_p, tiles, num_tiles, num_blocks, b, weights))
      pv_tiles_block<1>(weights[0], tiles, num_tiles, num_blocks, b, out, ld_acc);
    else
      pv_tiles_odd(row, tiles, num_tiles, num_blocks, b, out);
  }
}

/// Blocks b to end - 1, B at a time, then half as many, down to one.
template <int R, int B>
void pv_tiles_blocks(const float *p, size_t ld_p, const Rows &tiles, int num_tiles, int num_blocks,
                     int b, int end, float *acc, size_t ld_acc) noexcept {
  for (; b + B <= end; b += B) {
    PvWeights weights[B][R];
    if (make_weights<R, B, false>(p, ld_p, tiles, num_tiles, num_blocks, b, weights)) {
      for (int block = 0; block < B; ++block)
        pv_tiles_block<R>(weights[block], tiles, num_tiles, num_blocks, b + block, acc, ld_acc);
    } else if constexpr (B > 1) {
      pv_tiles_blocks<R, 1>(p, ld_p, tiles, num_tiles, num_blocks, b, b + B, acc, ld_acc);
    } else {
      pv_tiles_careful<R>(p, ld_p, tiles, num_tiles, num_blocks, b, acc, ld_acc);
    }
  }
  if constexpr (B > 1)
    pv_tiles_blocks<R, B / 2>(p, ld_p, tiles, num_tiles, num_blocks, b, end, acc, ld_acc);
}

void pv_tiles(const float *p, size_t ld_p, int num_rows, const Rows *tiles, int num_tiles,
              int head_dim_v, float *acc, size_t ld_acc) noexcept {
  const int num_blocks = head_dim_v / QK4_0;
  for (int t = 0; t < num_tiles; t += kPvTiles) {
    const int count = num_tiles - t < kPvTiles ? num_tiles - t : kPvTiles;
    Rows part = rows_from(*tiles, t);
    part.num_ahead = tiles->num_ahead + num_tiles - t - count;
    for (int r = 0; r < num_rows; r += kPackedRows) {
      const float *weights = p + at(r, ld_p, t * kTileTokens);
      float *out = acc + at(r, ld_acc, 0);
      switch (num_rows - r) {
      case 1:
        pv_tiles_blocks<1, kWeightBlocks>(weights, ld_p, part, count, num_blocks, 0, num_blocks,
                                          out, ld_acc);
        break;
      case 2:
        pv_tiles_blocks<2, kWeightBlocks>(weights, ld_p, part, count, num_blocks, 0, num_blocks,
                                          out, ld_acc);
        break;
      case 3:
        pv_tiles_blocks<3, kWeightBlocks>(weights, ld_p, part, count, num_blocks, 0, num_blocks,
                                          out, ld_acc);
        break;
      default:
        pv_tiles_blocks<kPackedRows, kWeightBlocks>(weights, ld_p, part, count, num_blocks, 0,
                                                    num_blocks, out, ld_acc);
      }
    }
  }
}
