// Values in token tiles (formats/token_tile.h), weighted and added up for a group of query rows, in
// integers.
//
// Lanes are dims. A row's weights p * d of a block's tokens are rounded to 16 bits relative to the
// largest of the run (8 bits would cost 4e-2), pairs of tokens are multiplied and added at a time;
// sums are exact and are scaled and added to acc once a run. Relative to the largest |d| alone
// would not do: a token with large values that hardly counts would round the others away.
//
// Rounding may cost half a step a token, and many equal weights are all rounded the same way. Where
// the weights of a run add up to so much that this can't be more than kWeightErrorLimit of it, that
// is all. Where they may not, since few tokens have nearly all the weight, what rounding left of
// a row's weights is added up as well, unless it is seen to be little.
//
// A 32-bit word holds one dim of several tokens: [token / kWordTokens][dim] of a tile. A format
// says in a struct V how they are opened:
//
//   kCodeBytes     bytes of a block's codes
//   kOffset        opened codes are the format's plus this, 255 at most
//   kWordTokens    tokens of a word
//   kHighShift     opened codes of odd pairs are shifted left by so many bits
//   open(x)        a vector of words, changed in what all of its pairs share
//   pair<K>(x)     the codes of tokens 2 K and 2 K + 1 as halves
//                  where a word of theirs would hold all of a tile, kWordTokens is kTileTokens and
//   open_block(block, dim)   opens a vector of dims from the bytes of a block of values instead, to
//                  what pair<K> takes, V::Opened
//   code(tile, num_blocks, block, i, token)   one code, by itself

enum : int {
  /// Tokens whose weights are held at a time. int32 sums can't overflow: 2^15 * 255 * 128,
  /// in those of even pairs and in those of odd ones.
  kPvTiles = 16,
  kPvTokens = kPvTiles * kTileTokens,
};

/// Most of what rounding may change of a row's weights of a run, added up, relative to their sum.
constexpr float kWeightErrorLimit = 8e-4f;
/// The same, of what rounding did change.
constexpr float kRestLimit = 1e-4f;

/// A row's weights of a run's tokens for one block of values, times scale.
struct PvWeights {
  alignas(64) int16_t numbers[kPvTokens];
  float scale, inverse;
  bool closer; ///< whether rounding may be above the limit
  /// -kOffset times their sum: what opened codes add too much.
  i32 offset;
};

/// Weights of blocks b to b + B - 1. False where a product is not finite, which leaves them
/// undefined. With Hide, tokens that a row does not see may hold anything; otherwise they count.
/// Several blocks at a time, so that the largest of one is found while another is waited for.
template <typename V, int R, int B, bool Hide>
bool make_weights(const float *p, size_t ld_p, const Rows &tiles, int num_tiles, int num_blocks,
                  int b, PvWeights (&weights)[B][R]) noexcept {
  alignas(64) float scales[B][kPvTokens];
  for (int i = 0; i < num_tiles; ++i) {
    const f16_t *d = scale_at<V>(tile_at(tiles, i), num_blocks, b, 0);
    for (int j = 0; j < B * kTileTokens; j += kLanes) {
      const int block = j / kTileTokens, token = j % kTileTokens;
      store(scales[block] + i * kTileTokens + token,
            load(d + block / kScaleBlocks<V> * kTileTokens + token));
    }
  }
  const auto products = [&](int t, f32v d, f32v(&x)[R]) {
    for (int r = 0; r < R; ++r) {
      const f32v weight = load(p + at(r, ld_p, t));
      x[r] = mul(weight, d);
      if (Hide)
        x[r] = select_below(zero(), weight, x[r], zero());
    }
  };
  const int num_tokens = num_tiles * kTileTokens;
  f32v largest[B][R], total[B][R];
  for (int block = 0; block < B; ++block) {
    for (int r = 0; r < R; ++r)
      largest[block][r] = total[block][r] = zero();
    for (int t = 0; t < num_tokens; t += kLanes) {
      f32v x[R]; // magnitudes: a weight has no sign, d's is dropped once for all rows
      products(t, abs_of(load(scales[block] + t)), x);
      for (int r = 0; r < R; ++r) {
        largest[block][r] = max_bits(x[r], largest[block][r]);
        total[block][r] = add(x[r], total[block][r]);
      }
    }
  }
  bool odd = false;
  for (int block = 0; block < B; ++block) {
    const f32v(&of_row)[R] = total[block];
    float totals[4];
    sum4(totals, of_row[0], of_row[R > 1 ? 1 : 0], of_row[R > 2 ? 2 : 0], of_row[R > 3 ? 3 : 0]);
    for (int r = 0; r < R; ++r) {
      constexpr float kLargest = 32767.0f;
      odd |= any_not_finite(largest[block][r]);
      const float top = max_lanes(largest[block][r]);
      // What is too small to be inverted contributes nothing that f32 sums could show.
      const bool useful = top > 1e-30f;
      const float scale = useful ? top * (1.0f / kLargest) : 0.0f;
      PvWeights &of = weights[block][r];
      of.inverse = useful ? kLargest / top : 0.0f;
      of.scale = scale;
      of.closer =
          (totals[r] - top) * kWeightErrorLimit < static_cast<float>(num_tokens) * 0.5f * scale;
    }
  }
  if (odd)
    return false;
  for (int block = 0; block < B; ++block) {
    i32v sum[R];
    for (int r = 0; r < R; ++r)
      sum[r] = zero_i32();
    for (int t = 0; t < num_tokens; t += kLanes) {
      f32v x[R];
      products(t, load(scales[block] + t), x);
      for (int r = 0; r < R; ++r) {
        const i32v rounded = to_i32(mul(x[r], set1(weights[block][r].inverse)));
        sum[r] = add_i32(sum[r], rounded);
        store_halves(weights[block][r].numbers + t, rounded);
      }
    }
    for (int r = 0; r < R; ++r)
      weights[block][r].offset = -V::kOffset * sum_lanes(sum[r]);
  }
  return true;
}

/// Adds pairs P to the last one of N vectors of words, whose first token is `token`.
template <typename V, int P, int R, int N, typename X>
MIXEDKV_INLINE void add_pairs(const X (&x)[N], const PvWeights (&weights)[R], int token,
                              i32v (&even)[R][N], i32v (&odd)[R][N]) {
  i32v pairs[N];
  for (int n = 0; n < N; ++n)
    pairs[n] = V::template pair<P>(x[n]);
  for (int r = 0; r < R; ++r) {
    i32 both;
    memcpy(&both, weights[r].numbers + token + 2 * P, sizeof both);
    const i32v y = set1_i32(both);
    i32v(&sum)[N] = P % 2 == 0 ? even[r] : odd[r];
    for (int n = 0; n < N; ++n)
      sum[n] = madd16(sum[n], pairs[n], y);
  }
  if constexpr (P + 1 < V::kWordTokens / 2)
    add_pairs<V, P + 1>(x, weights, token, even, odd);
}

/// N vectors of dims of a block, from dim i of the head on.
template <typename V, int R, int N>
MIXEDKV_INLINE void pv_tiles_dims(const PvWeights (&weights)[R], const Rows &tiles, int num_tiles,
                                  size_t word_bytes, int i, float *acc, size_t ld_acc) {
  i32v even[R][N], odd[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) {
      even[r][n] = set1_i32(weights[r].offset);
      odd[r][n] = zero_i32();
    }
  for (int t = 0; t < num_tiles; ++t) {
    if constexpr (V::kWordTokens == kTileTokens) {
      const uint8_t *block = tile_at(tiles, t) + i / kTileBlock * kTileTokens * V::kCodeBytes;
      const int dim = N * kLanes == kTileBlock ? 0 : i % kTileBlock;
      typename V::Opened x[N];
      for (int n = 0; n < N; ++n)
        x[n] = V::open_block(block, dim + n * kLanes);
      add_pairs<V, 0>(x, weights, t * kTileTokens, even, odd);
    } else {
      const uint8_t *words = tile_at(tiles, t) + i * 4;
      for (int token = 0; token < kTileTokens; token += V::kWordTokens, words += word_bytes) {
        i32v x[N];
        for (int n = 0; n < N; ++n)
          x[n] = V::open(load_i32(words + n * kLanes * 4));
        add_pairs<V, 0>(x, weights, t * kTileTokens + token, even, odd);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) {
      const i32v total = add_i32(even[r][n], shift_right_signed<V::kHighShift>(odd[r][n]));
      float *a = acc + at(r, ld_acc, i + n * kLanes);
      store(a, fma(to_f32(total), set1(weights[r].scale), load(a)));
    }
}

/// Adds R rows' block b by these weights.
template <typename V, int R>
void pv_tiles_block(const PvWeights (&weights)[R], const Rows &tiles, int num_tiles, int num_blocks,
                    int b, float *acc, size_t ld_acc) noexcept {
  // The next run's tiles, a share with every block.
  constexpr ptrdiff_t bytes = kTileTokens * V::kCodeBytes + kTileScaleBytes;
  for (int t = 0; t < num_tiles; ++t)
    prefetch_tile(tiles, num_tiles, num_tiles + t, b * bytes, bytes);
  constexpr int N = kValueVectors;
  const size_t word_bytes = static_cast<size_t>(num_blocks) * kTileBlock * 4;
  for (int i = b * kTileBlock; i < (b + 1) * kTileBlock; i += N * kLanes)
    pv_tiles_dims<V, R, N>(weights, tiles, num_tiles, word_bytes, i, acc, ld_acc);
}

/// One row and one block of values whose products are not all finite, value by value.
template <typename V>
void pv_tiles_odd(const float *p, const Rows &tiles, int num_tiles, int num_blocks, int block,
                  float *acc) noexcept {
  for (int t = 0; t < num_tiles * kTileTokens; ++t) {
    if (p[t] == 0.0f)
      continue; // unseen, and it must stay so
    const uint8_t *tile = tile_at(tiles, t / kTileTokens);
    const int token = t % kTileTokens;
    float d[1];
    f16_to_f32(scale_at<V>(tile, num_blocks, block, token), d, 1);
    for (int i = 0; i < kTileBlock; ++i) {
      const int code = V::code(tile, num_blocks, block, i, token);
      acc[block * kTileBlock + i] += p[t] * (static_cast<float>(code) * d[0]);
    }
  }
}

/// Adds what rounding left of one row's weights of block b, where they need it.
template <typename V>
MIXEDKV_RARE void pv_tiles_rest(const PvWeights &rounded, const float *p, const Rows &tiles,
                                int num_tiles, int num_blocks, int b, float *acc) noexcept {
  constexpr float kPart = 65534.0f; // of a step; what is left is half a step at most
  PvWeights rest[1];
  f32v left_over = zero(), total = zero();
  i32v sum = zero_i32();
  for (int t = 0; t < num_tiles * kTileTokens; t += kLanes) {
    const int token = t % kTileTokens;
    const f16_t *d = scale_at<V>(tile_at(tiles, t / kTileTokens), num_blocks, b, token);
    const f32v weight = load(p + t);
    const f32v x = mul(mul(weight, load(d)), set1(rounded.inverse));
    const f32v seen = select_below(zero(), weight, x, zero());
    const f32v left = sub(seen, to_f32(to_i32(seen)));
    const i32v number = to_i32(mul(left, set1(kPart)));
    left_over = add(left_over, abs_of(left));
    total = add(total, abs_of(seen));
    sum = add_i32(sum, number);
    store_halves(rest[0].numbers + t, number);
  }
  if (sum_lanes(left_over) <= kRestLimit * sum_lanes(total))
    return;
  rest[0].scale = rounded.scale * (1.0f / kPart);
  rest[0].offset = -V::kOffset * sum_lanes(sum);
  pv_tiles_block<V, 1>(rest, tiles, num_tiles, num_blocks, b, acc, 0);
}

/// Block b of R rows.
template <typename V, int R>
void pv_tiles_rounded(const PvWeights (&weights)[R], const float *p, size_t ld_p, const Rows &tiles,
                      int num_tiles, int num_blocks, int b, float *acc, size_t ld_acc) noexcept {
  pv_tiles_block<V, R>(weights, tiles, num_tiles, num_blocks, b, acc, ld_acc);
  for (int r = 0; r < R; ++r)
    if (weights[r].closer)
      pv_tiles_rest<V>(weights[r], p + at(r, ld_p, 0), tiles, num_tiles, num_blocks, b,
                       acc + at(r, ld_acc, 0));
}

/// Block b of R rows where a product is not finite. A row's result follows from what it sees
/// itself, whatever the others see.
template <typename V, int R>
void pv_tiles_careful(const float *p, size_t ld_p, const Rows &tiles, int num_tiles, int num_blocks,
                      int b, float *acc, size_t ld_acc) noexcept {
  for (int r = 0; r < R; ++r) {
    PvWeights weights[1][1];
    const float *row = p + at(r, ld_p, 0);
    float *out = acc + at(r, ld_acc, 0);
    if (make_weights<V, 1, 1, true>(row, ld_p, tiles, num_tiles, num_blocks, b, weights))
      pv_tiles_rounded<V, 1>(weights[0], row, ld_p, tiles, num_tiles, num_blocks, b, out, ld_acc);
    else
      pv_tiles_odd<V>(row, tiles, num_tiles, num_blocks, b, out);
  }
}

/// Blocks b to end - 1, B at a time, then half as many, down to one.
template <typename V, int R, int B>
void pv_tiles_blocks(const float *p, size_t ld_p, const Rows &tiles, int num_tiles, int num_blocks,
                     int b, int end, float *acc, size_t ld_acc) noexcept {
  for (; b + B <= end; b += B) {
    PvWeights weights[B][R];
    if (make_weights<V, R, B, false>(p, ld_p, tiles, num_tiles, num_blocks, b, weights)) {
      for (int block = 0; block < B; ++block)
        pv_tiles_rounded<V, R>(weights[block], p, ld_p, tiles, num_tiles, num_blocks, b + block,
                               acc, ld_acc);
    } else if constexpr (B > 1) {
      pv_tiles_blocks<V, R, 1>(p, ld_p, tiles, num_tiles, num_blocks, b, b + B, acc, ld_acc);
    } else {
      pv_tiles_careful<V, R>(p, ld_p, tiles, num_tiles, num_blocks, b, acc, ld_acc);
    }
  }
  if constexpr (B > 1)
    pv_tiles_blocks<V, R, B / 2>(p, ld_p, tiles, num_tiles, num_blocks, b, end, acc, ld_acc);
}

template <typename V>
void pv_tiles(const float *p, size_t ld_p, int num_rows, const Rows *tiles, int num_tiles,
              int head_dim_v, float *acc, size_t ld_acc) noexcept {
  const int num_blocks = head_dim_v / kTileBlock;
  for (int t = 0; t < num_tiles; t += kPvTiles) {
    const int count = num_tiles - t < kPvTiles ? num_tiles - t : kPvTiles;
    Rows part = rows_from(*tiles, t);
    part.num_ahead = tiles->num_ahead + num_tiles - t - count;
    for (int r = 0; r < num_rows; r += kPackedRows) {
      const float *weights = p + at(r, ld_p, t * kTileTokens);
      float *out = acc + at(r, ld_acc, 0);
      switch (num_rows - r) {
      case 1:
        pv_tiles_blocks<V, 1, kWeightBlocks>(weights, ld_p, part, count, num_blocks, 0, num_blocks,
                                             out, ld_acc);
        break;
      case 2:
        pv_tiles_blocks<V, 2, kWeightBlocks>(weights, ld_p, part, count, num_blocks, 0, num_blocks,
                                             out, ld_acc);
        break;
      case 3:
        pv_tiles_blocks<V, 3, kWeightBlocks>(weights, ld_p, part, count, num_blocks, 0, num_blocks,
                                             out, ld_acc);
        break;
      default:
        pv_tiles_blocks<V, kPackedRows, kWeightBlocks>(weights, ld_p, part, count, num_blocks, 0,
                                                       num_blocks, out, ld_acc);
      }
    }
  }
}
