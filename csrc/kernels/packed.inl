// Packed Q4_0 (packed.h) against a group of query rows, in integers.
//
// qk: each block of a query row is rounded once to 15 bits, q = s * (128 * hi + lo), two signed
// bytes a dim. Lanes are tokens: a vector of words, split into low and high nibbles, is multiplied
// by four broadcast bytes of hi and of lo at a time. Sums of a block are exact; they are scaled by
// s and the tokens' d. One byte a dim instead of two would leave an error of 5e-3, two leave 1e-4
// and less; one s for the whole row would let a large query channel round the others away, which
// large key channels then show.
//
// pv: lanes are dims. A row's weights p * d of a block's tokens are rounded to 16 bits relative to
// the largest of the run (8 bits would cost 4e-2), pairs of tokens are multiplied and added at a
// time; sums are exact again and are scaled and added to acc once a run. Relative to the largest
// |d| alone would not do: a token with large values that hardly counts would round the others away.
//
// Unpacking serves all rows of a group; what a group shares is held in registers.

using i32 = int32_t;

enum : int {
  kWordsOfBlock = QK4_0 / 4,
  /// Prepared form of a block: hi bytes, lo bytes, -8 times the sum of the numbers, and s.
  kPreparedBlock = 2 * kWordsOfBlock + 2,
  /// Tokens whose weights are held at a time: int32 sums can't overflow, 2^15 * 8 * 2^8.
  kPvTiles = 16,
  kPvTokens = kPvTiles * kPackedTokens,
  kPackedRows = 4,
  kTileVectors = kPackedTokens / kLanes,
};

MIXEDKV_INLINE const uint8_t *tile_at(const Rows &tiles, int i) {
  return row_at<uint8_t>(tiles, i);
}

// --- queries -----------------------------------------------------------------------------------

/// A row: num_blocks * kPreparedBlock words.
MIXEDKV_INLINE size_t prepared_row(int head_dim) {
  return packed_query_floats(static_cast<size_t>(head_dim));
}

MIXEDKV_INLINE void prepare_block(const float *x, i32 *out) {
  f32v largest_of = zero();
  bool odd = false;
  for (int i = 0; i < QK4_0; i += kLanes) {
    odd |= any_not_finite(load(x + i));
    largest_of = max_or_second(abs_of(load(x + i)), largest_of);
  }
  const float largest = max_lanes(largest_of);
  constexpr float kLargest = 127.0f * 128.0f;
  // What is too small to be inverted contributes nothing that f32 scores could show.
  const bool useful = !odd && largest > 1e-30f;
  const f32v inverse = set1(useful ? kLargest / largest : 0.0f);
  int16_t numbers[QK4_0];
  for (int i = 0; i < QK4_0; i += kLanes)
    store_rounded(numbers + i, useful ? mul(load(x + i), inverse) : zero());
  int8_t bytes[2 * QK4_0];
  i32 total = 0;
  for (int i = 0; i < QK4_0; ++i) {
    const int hi = (numbers[i] + 64) >> 7;
    bytes[i] = static_cast<int8_t>(hi);
    bytes[QK4_0 + i] = static_cast<int8_t>(numbers[i] - hi * 128);
    total += numbers[i];
  }
  memcpy(out, bytes, sizeof bytes);
  out[2 * kWordsOfBlock] = -8 * total;
  const float scale = odd ? NAN : useful ? largest / kLargest : 0.0f;
  memcpy(out + 2 * kWordsOfBlock + 1, &scale, sizeof scale);
}

void prepare_packed_query(const float *q, size_t ld_q, int num_rows, int head_dim,
                          float *prepared) noexcept {
  for (int r = 0; r < num_rows; ++r) {
    i32 *out = reinterpret_cast<i32 *>(prepared + static_cast<size_t>(r) * prepared_row(head_dim));
    for (int b = 0; b < head_dim / QK4_0; ++b)
      prepare_block(q + at(r, ld_q, b * QK4_0), out + b * kPreparedBlock);
  }
}

// --- qk ----------------------------------------------------------------------------------------

/// Scores of R rows against V vectors of tokens; vector v's words are at words[v], kPackedTokens
/// apart, its scales at scales[v].
template <int R, int V>
MIXEDKV_INLINE void packed_scores(const i32 *q, size_t ld_q, const uint8_t *const (&words)[V],
                                  const f16_t *const (&scales)[V], int num_blocks,
                                  float *const (&scores)[V], size_t ld_scores) {
  f32v sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      sum[r][v] = zero();
  for (int b = 0; b < num_blocks; ++b) {
    i32v nibbles[kWordsOfBlock][V];
    f32v d[V];
    for (int v = 0; v < V; ++v) {
      for (int w = 0; w < kWordsOfBlock / 2; ++w) {
        const i32v x = load_i32(words[v] + b * kPackedBlockBytes + w * kPackedTokens * 4);
        nibbles[w][v] = low_nibbles(x);
        nibbles[w + kWordsOfBlock / 2][v] = high_nibbles(x);
      }
      d[v] = load(scales[v] + b * kPackedTokens);
    }
    for (int r = 0; r < R; ++r) {
      const i32 *row = q + static_cast<size_t>(r) * ld_q + b * kPreparedBlock;
      Dot hi[V], lo[V];
      for (int v = 0; v < V; ++v)
        hi[v] = lo[v] = dot_zero();
      for (int w = 0; w < kWordsOfBlock; ++w) {
        const i32v x = set1_i32(row[w]);
        const i32v y = set1_i32(row[kWordsOfBlock + w]);
        for (int v = 0; v < V; ++v) {
          hi[v] = dot(hi[v], nibbles[w][v], x);
          lo[v] = dot(lo[v], nibbles[w][v], y);
        }
      }
      const i32v offset = set1_i32(row[2 * kWordsOfBlock]);
      float s;
      memcpy(&s, row + 2 * kWordsOfBlock + 1, sizeof s);
      const f32v scale = set1(s);
      for (int v = 0; v < V; ++v) {
        const i32v total =
            add_i32(add_i32(dot_total(lo[v]), offset), shift_left<7>(dot_total(hi[v])));
        sum[r][v] = fma(to_f32(total), mul(d[v], scale), sum[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      store(scores[v] + at(r, ld_scores, 0), sum[r][v]);
}

template <int R>
void qk_packed_rows(const i32 *q, size_t ld_q, const Rows &tiles, int num_tiles, int num_blocks,
                    float *scores, size_t ld_scores) noexcept {
  constexpr int V = kPackedVectors;
  // Far enough ahead that memory answers in time, near enough to stay in the second cache.
  const ptrdiff_t ahead = 8 * num_blocks * (kPackedBlockBytes + kPackedScaleBytes);
  const int n = num_tiles * kTileVectors;
  for (int x = 0; x < n; x += V) {
    const int count = n - x < V ? n - x : V;
    const uint8_t *words[V];
    const f16_t *scales[V];
    float *out[V];
    for (int v = 0; v < V; ++v) { // a short last step computes its last vector twice
      const int vector = x + (v < count ? v : count - 1);
      const uint8_t *tile = tile_at(tiles, vector / kTileVectors);
      const int token = vector % kTileVectors * kLanes;
      words[v] = tile + token * 4;
      scales[v] = packed_scale(tile, num_blocks, 0, token);
      out[v] = scores + vector * kLanes;
      if (token == 0)
        for (ptrdiff_t i = 0; i < ahead / 8; i += 64)
          prefetch(tile + ahead + i);
    }
    packed_scores<R, V>(q, ld_q, words, scales, num_blocks, out, ld_scores);
  }
}

void qk_packed(const float *prepared, int num_rows, const Rows *tiles, int num_tiles, int head_dim,
               float *scores, size_t ld_scores) noexcept {
  const size_t ld = prepared_row(head_dim);
  const int num_blocks = head_dim / QK4_0;
  for (int r = 0; r < num_rows; r += kPackedRows) {
    const i32 *q = reinterpret_cast<const i32 *>(prepared + static_cast<size_t>(r) * ld);
    float *out = scores + at(r, ld_scores, 0);
    switch (num_rows - r) {
    case 1:
      qk_packed_rows<1>(q, ld, *tiles, num_tiles, num_blocks, out, ld_scores);
      break;
    case 2:
      qk_packed_rows<2>(q, ld, *tiles, num_tiles, num_blocks, out, ld_scores);
      break;
    case 3:
      qk_packed_rows<3>(q, ld, *tiles, num_tiles, num_blocks, out, ld_scores);
      break;
    default:
      qk_packed_rows<kPackedRows>(q, ld, *tiles, num_tiles, num_blocks, out, ld_scores);
    }
  }
}

// --- pv ----------------------------------------------------------------------------------------

/// One row and one block of values whose products are not all finite, value by value.
void pv_packed_odd(const float *p, const Rows &tiles, int num_tiles, int num_blocks, int block,
                   float *acc) noexcept {
  for (int t = 0; t < num_tiles * kPackedTokens; ++t) {
    if (p[t] == 0.0f)
      continue; // unseen, and it must stay so
    const uint8_t *tile = tile_at(tiles, t / kPackedTokens);
    const int token = t % kPackedTokens;
    float d[1];
    f16_to_f32(packed_scale(tile, num_blocks, block, token), d, 1);
    for (int i = 0; i < QK4_0; ++i) {
      uint32_t word;
      memcpy(&word, tile + (token / 8 * num_blocks * QK4_0 + block * QK4_0 + i) * 4, 4);
      const int nibble = static_cast<int>((word >> packed_value_shift(token) & 15u) ^ 8u) - 8;
      acc[block * QK4_0 + i] += p[t] * (static_cast<float>(nibble) * d[0]);
    }
  }
}

/// Adds the K-th pair of tokens of eight: x holds their words, w[r] row r's weights.
template <int K, int R, int N>
MIXEDKV_INLINE void add_pairs(const i32v (&x)[N], const int16_t *const (&w)[R], i32v (&sum)[R][N]) {
  i32v pairs[N];
  for (int n = 0; n < N; ++n)
    pairs[n] = nibble16<K>(x[n]);
  for (int r = 0; r < R; ++r) {
    i32 both;
    memcpy(&both, w[r] + 2 * K, sizeof both);
    const i32v y = set1_i32(both);
    for (int n = 0; n < N; ++n)
      sum[r][n] = madd16(sum[r][n], pairs[n], y);
  }
}

/// N vectors of dims of a block, from dim i of the head on.
template <int R>
MIXEDKV_INLINE void pv_packed_dims(const int16_t (&weights)[R][kPvTokens], const Rows &tiles,
                                   int num_tiles, size_t group_bytes, int i,
                                   const float (&scales)[R], float *acc, size_t ld_acc) {
  constexpr int N = 2;
  i32v sum[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n)
      sum[r][n] = zero_i32();
  for (int t = 0; t < num_tiles; ++t) {
    const uint8_t *words = tile_at(tiles, t) + i * 4;
    for (int g = 0; g < 2; ++g, words += group_bytes) {
      i32v x[N];
      for (int n = 0; n < N; ++n)
        x[n] = load_i32(words + n * kLanes * 4);
      const int16_t *w[R];
      for (int r = 0; r < R; ++r)
        w[r] = weights[r] + t * kPackedTokens + g * 8;
      add_pairs<0>(x, w, sum);
      add_pairs<1>(x, w, sum);
      add_pairs<2>(x, w, sum);
      add_pairs<3>(x, w, sum);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) {
      float *a = acc + at(r, ld_acc, i + n * kLanes);
      store(a, fma(to_f32(sum[r][n]), set1(scales[r]), load(a)));
    }
}

/// Block b of R rows. A row's result follows from what it sees itself, whatever the others see.
template <int R>
void pv_packed_block(const float *p, size_t ld_p, const Rows &tiles, int num_tiles, int num_blocks,
                     int b, float *acc, size_t ld_acc) noexcept {
  alignas(64) float products[R][kPvTokens];
  alignas(64) int16_t weights[R][kPvTokens];
  const int num_tokens = num_tiles * kPackedTokens;
  f32v largest[R];
  for (int r = 0; r < R; ++r)
    largest[r] = zero();
  bool odd = false;
  for (int t = 0; t < num_tokens; t += kLanes) {
    const uint8_t *tile = tile_at(tiles, t / kPackedTokens);
    const f32v d = load(packed_scale(tile, num_blocks, b, t % kPackedTokens));
    f32v all = zero();
    for (int r = 0; r < R; ++r) {
      const f32v x = load(p + at(r, ld_p, t));
      // A token that the row does not see may hold anything.
      const f32v product = select_below(zero(), x, mul(x, d), zero());
      largest[r] = max_or_second(abs_of(product), largest[r]);
      // NaN and infinities stay NaN and infinities, or become NaN, in a sum.
      all = add(all, abs_of(product));
      store(products[r] + t, product);
    }
    odd |= any_not_finite(all);
  }
  if (odd) {
    for (int r = 0; r < R; ++r)
      if constexpr (R > 1)
        pv_packed_block<1>(p + at(r, ld_p, 0), ld_p, tiles, num_tiles, num_blocks, b,
                           acc + at(r, ld_acc, 0), ld_acc);
      else
        pv_packed_odd(p, tiles, num_tiles, num_blocks, b, acc);
    return;
  }
  float scales[R];
  bool useful = false;
  for (int r = 0; r < R; ++r) {
    constexpr float kLargest = 32767.0f;
    const float top = max_lanes(largest[r]);
    // What is too small to be inverted contributes nothing that f32 sums could show.
    const bool row_useful = top > 1e-30f;
    useful |= row_useful;
    scales[r] = row_useful ? top / kLargest : 0.0f;
    const f32v inverse = set1(row_useful ? kLargest / top : 0.0f);
    for (int t = 0; t < num_tokens; t += kLanes)
      store_rounded(weights[r] + t, mul(load(products[r] + t), inverse));
  }
  if (!useful)
    return; // no row sees a value other than zero
  // The next run's tiles, a share with every block.
  const ptrdiff_t bytes = kPackedBlockBytes + kPackedScaleBytes;
  for (int t = 0; t < num_tiles; ++t) {
    const uint8_t *tile = tile_at(tiles, t) + num_tiles * num_blocks * bytes;
    for (ptrdiff_t i = b * bytes; i < (b + 1) * bytes; i += 64)
      prefetch(tile + i);
  }
  const size_t group_bytes = static_cast<size_t>(num_blocks) * QK4_0 * 4;
  for (int i = b * QK4_0; i < (b + 1) * QK4_0; i += 2 * kLanes)
    pv_packed_dims<R>(weights, tiles, num_tiles, group_bytes, i, scales, acc, ld_acc);
}

template <int R>
void pv_packed_rows(const float *p, size_t ld_p, const Rows &tiles, int num_tiles, int num_blocks,
                    float *acc, size_t ld_acc) noexcept {
  for (int b = 0; b < num_blocks; ++b)
    pv_packed_block<R>(p, ld_p, tiles, num_tiles, num_blocks, b, acc, ld_acc);
}

void pv_packed(const float *p, size_t ld_p, int num_rows, const Rows *tiles, int num_tiles,
               int head_dim_v, float *acc, size_t ld_acc) noexcept {
  const int num_blocks = head_dim_v / QK4_0;
  for (int t = 0; t < num_tiles; t += kPvTiles) {
    const int count = num_tiles - t < kPvTiles ? num_tiles - t : kPvTiles;
    const Rows part = rows_from(*tiles, t);
    for (int r = 0; r < num_rows; r += kPackedRows) {
      const float *weights = p + at(r, ld_p, t * kPackedTokens);
      float *out = acc + at(r, ld_acc, 0);
      switch (num_rows - r) {
      case 1:
        pv_packed_rows<1>(weights, ld_p, part, count, num_blocks, out, ld_acc);
        break;
      case 2:
        pv_packed_rows<2>(weights, ld_p, part, count, num_blocks, out, ld_acc);
        break;
      case 3:
        pv_packed_rows<3>(weights, ld_p, part, count, num_blocks, out, ld_acc);
        break;
      default:
        pv_packed_rows<kPackedRows>(weights, ld_p, part, count, num_blocks, out, ld_acc);
      }
    }
  }
}
