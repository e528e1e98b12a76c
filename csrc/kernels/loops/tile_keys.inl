// Keys in token tiles (formats/token_tile.h) against a group of query rows, in integers.
//
// Each block of a query row is rounded once to a sign and 14 bits of magnitude or more, q = s * n.
// Lanes are tokens: codes of four dims to a 32-bit word are multiplied by the row's numbers of
// these dims, all of them broadcast, and add up within their lane. Sums of a block are exact; they
// are scaled by s and the tokens' d. Rounding to 8 bits would leave an error of 5e-3; one s for the
// whole row would let a large query channel round the others away, which large key channels then
// show.
//
// Rounding q leaves e, which adds e . c * d of every block to a score. Where codes and errors know
// nothing of each other that is about |e| times the largest |c| times |d|, whose root mean square
// over the blocks is what is watched, for every token: the queries and keys of models stay far
// below kErrorLimit, an outlier channel of a query beside another one of keys does not. There e is
// rounded and multiplied like q. What a row's score gets depends on that row and that token alone:
// the watch over a group of rows only says where to look closer.
//
// Unpacking serves all rows of a group; what a group shares is held in registers.
//
// A format says how its codes are opened, in a struct K:
//
//   kCodeBytes            bytes of a block's codes
//   kOffset               opened codes are the format's plus this
//   kLargestCode          largest magnitude of the format's codes
//   Products              how they are multiplied (loops/tile_products.inl)
//   open(x, codes)        the codes of a vector of tokens as bytes, dims 4 w to 4 w + 3 of their
//   block
//                         in codes[w], from the words x of that vector, as they lie in a tile

enum : int {
  /// Prepared form of a block: its numbers, what is added for -kOffset times their sum, s, and the
  /// square of what the block may add to a score's error where d is 1, in units of kErrorLimit.
  kPreparedBlock = kNumberWords + 3,
  /// Asked for so far ahead: memory answers in time, and the second cache still has room.
  kTilesAsked = 8,
  kPackedRows = 4,
};

MIXEDKV_INLINE const uint8_t *tile_at(const Rows &tiles, int i) {
  return row_at<uint8_t>(tiles, i);
}

/// Asks for `bytes` of tile t, counted from `offset`, if it is known where that tile is; n tiles
/// are the call's own, t may be beyond.
MIXEDKV_INLINE void prefetch_tile(const Rows &tiles, int n, int t, ptrdiff_t offset,
                                  ptrdiff_t bytes) {
  if (tiles.index && t >= n + tiles.num_ahead)
    return;
  const ptrdiff_t place = tiles.index ? tiles.index[t] : t;
  // As a number: the address may lie behind the end of everything, which a hint may.
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tiles.base) +
                          static_cast<uintptr_t>(place * tiles.stride + offset);
  for (ptrdiff_t i = 0; i < bytes; i += 64)
    prefetch(reinterpret_cast<const void *>(begin + static_cast<uintptr_t>(i)));
}

// --- queries -----------------------------------------------------------------------------------

/// What is left of a score's error, estimated as above, where nothing more is done about it. A
/// score's error is that of its weight, relative.
constexpr float kErrorLimit = 5e-4f;

/// A row: num_blocks * kPreparedBlock words, then the query as it was, then the largest d that may
/// stand beside all of its blocks with no error above the limit, as the bits of an f16.
MIXEDKV_INLINE size_t prepared_row(int head_dim) {
  return tile_query_floats(static_cast<size_t>(head_dim));
}

/// How a block of a query row is rounded.
template <typename K> struct BlockSteps {
  float inverse = 0.0f, scale = 0.0f;
  MIXEDKV_INLINE explicit BlockSteps(const float *x) {
    f32v largest_of = zero();
    bool odd = false;
    for (int i = 0; i < kTileBlock; i += kLanes) {
      odd |= any_not_finite(load(x + i));
      largest_of = max_or_second(abs_of(load(x + i)), largest_of);
    }
    constexpr float kLargest = K::Products::kLargest;
    const float largest = max_lanes(largest_of);
    if (odd) {
      scale = NAN;
    } else if (largest > 1e-30f) { // what can't be inverted adds nothing that f32 scores could show
      inverse = kLargest / largest;
      scale = largest / kLargest;
    }
  }
  bool useful() const { return inverse > 0.0f; }
  MIXEDKV_INLINE i32v number(const float *x) const {
    return to_i32(useful() ? mul(load(x), set1(inverse)) : zero());
  }
};

template <typename K> MIXEDKV_INLINE void prepare_block(const float *x, i32 *out) {
  const BlockSteps<K> steps(x);
  i32v total = zero_i32();
  for (int i = 0; i < kTileBlock; i += kLanes) {
    const i32v number = steps.number(x + i);
    K::Products::put(out, i, number);
    total = add_i32(total, number);
  }
  out[kNumberWords] = -K::kOffset * sum_lanes(total);
  memcpy(out + kNumberWords + 1, &steps.scale, sizeof steps.scale);
  // Errors anywhere up to half a step: each number's square is a twelfth of the step's.
  const float step = steps.useful() ? steps.scale * (K::kLargestCode / kErrorLimit) : 0.0f;
  const float sum = step * step * (kTileBlock / 12.0f), most = 1e30f; // which d = 0 still hides
  const float square = sum < most ? sum : most;
  memcpy(out + kNumberWords + 2, &square, sizeof square);
}

MIXEDKV_INLINE float square_error(const i32 *block) {
  float square;
  memcpy(&square, block + kNumberWords + 2, sizeof square);
  return square;
}

/// The bits of the largest f16 that is not above x >= 0, finite.
MIXEDKV_INLINE i32 half_below(float x) {
  constexpr float kLargest = 65504.0f, kSmallestNormal = 6.103515625e-5f;
  if (!(x < kLargest))
    return 0x7bff;
  if (x < kSmallestNormal)
    return static_cast<i32>(x * 16777216.0f); // units of 2^-24
  i32 bits;
  memcpy(&bits, &x, sizeof bits);
  return (bits >> 13) - ((127 - 15) << 10);
}

/// Where all d of a token are not above this its score's error is not above the limit.
MIXEDKV_INLINE i32 largest_scale(const i32 *row, int num_blocks) {
  float sum = 0.0f;
  for (int b = 0; b < num_blocks; ++b)
    sum += square_error(row + b * kPreparedBlock);
  return half_below(sqrtf(1.0f / (sum * 1.001f + 1e-30f))); // whatever was rounded
}

template <typename K>
void prepare_tile_query(const float *q, size_t ld_q, int num_rows, int head_dim,
                        float *prepared) noexcept {
  for (int r = 0; r < num_rows; ++r) {
    i32 *out = reinterpret_cast<i32 *>(prepared + static_cast<size_t>(r) * prepared_row(head_dim));
    const int num_blocks = head_dim / kTileBlock;
    for (int b = 0; b < num_blocks; ++b)
      prepare_block<K>(q + at(r, ld_q, b * kTileBlock), out + b * kPreparedBlock);
    i32 *rest = out + num_blocks * kPreparedBlock;
    memcpy(rest, q + at(r, ld_q, 0), static_cast<size_t>(head_dim) * sizeof(float));
    rest[head_dim] = largest_scale(out, num_blocks);
  }
}

/// What rounding left of one row's blocks from `first` on, prepared in turn. Where all have room
/// they are prepared once.
template <typename K> struct QueryRest {
  enum : int { kBlocks = 32 };
  i32 words[kBlocks * kPreparedBlock];
  bool ready = false;
  void prepare(const i32 *row, int num_blocks, int first, int count) {
    if (ready)
      return;
    ready = count == num_blocks;
    for (int b = 0; b < count; ++b) {
      alignas(64) float x[kTileBlock];
      memcpy(x, row + num_blocks * kPreparedBlock + (first + b) * kTileBlock, sizeof x);
      const BlockSteps<K> steps(x);
      for (int i = 0; i < kTileBlock; i += kLanes)
        store(x + i, steps.useful()
                         ? fma(to_f32(steps.number(x + i)), set1(-steps.scale), load(x + i))
                         : zero());
      prepare_block<K>(x, words + b * kPreparedBlock);
    }
  }
};

// --- qk ----------------------------------------------------------------------------------------

/// V vectors of tokens; vector v's words are at words[v], kTileTokens apart, its scales at
/// scales[v], and its scores go to scores[v].
template <int V> struct TokenVectors {
  const uint8_t *words[V];
  const f16_t *scales[V];
  float *scores[V];
};

/// The least of what largest_scale gave for a group's rows.
MIXEDKV_INLINE i32 scale_limit(const i32 *q, size_t ld_q, int num_rows, int num_blocks) {
  const i32 *limit = q + num_blocks * (kPreparedBlock + kTileBlock);
  i32 least = limit[0];
  for (int r = 1; r < num_rows; ++r) {
    limit += ld_q;
    least = *limit < least ? *limit : least;
  }
  return least;
}

/// Scores of R rows. `largest` becomes the largest |d| there, if it was less: whether errors may be
/// above the limit follows from it, for all tokens at once, in units that products leave free.
template <typename K, int R, int V>
MIXEDKV_INLINE void tile_scores(const i32 *q, size_t ld_q, const TokenVectors<V> &tokens,
                                int num_blocks, size_t ld_scores, h16v &largest) {
  f32v sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      sum[r][v] = zero();
  for (int b = 0; b < num_blocks; ++b) {
    i32v codes[V][kWordsOfBlock];
    f32v d[V];
    for (int v = 0; v < V; ++v) {
      i32v x[kOpenWords<K>];
      for (int w = 0; w < K::kCodeBytes / 4; ++w)
        x[w] = load_i32(tokens.words[v] + (b * K::kCodeBytes + w * 4) * kTileTokens);
      if constexpr (kOpenWords<K> * 4 != K::kCodeBytes)
        K::complete(x);
      K::Products::arrange(x);
      K::open(x, codes[v]);
      d[v] = load(tokens.scales[v] + b / kScaleBlocks<K> * kTileTokens);
      largest = max_magnitude_bits(largest, tokens.scales[v] + b / kScaleBlocks<K> * kTileTokens);
    }
    for (int r = 0; r < R; ++r) {
      const i32 *row = q + static_cast<size_t>(r) * ld_q + b * kPreparedBlock;
      i32v totals[V];
      K::Products::add_up(row, row[kNumberWords], codes, totals);
      float s;
      memcpy(&s, row + kNumberWords + 1, sizeof s);
      const f32v scale = set1(s);
      for (int v = 0; v < V; ++v)
        sum[r][v] = fma(to_f32(totals[v]), mul(d[v], scale), sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      store(tokens.scores[v] + at(r, ld_scores, 0), sum[r][v]);
}

/// Whether the errors of one row's scores may be above the limit, token by token: where square[v]
/// is above 1.
template <typename K, int V>
MIXEDKV_INLINE bool row_errors(const i32 *row, const TokenVectors<V> &tokens, int num_blocks,
                               f32v (&square)[V]) {
  bool any = false;
  for (int v = 0; v < V; ++v) {
    square[v] = zero();
    for (int b = 0; b < num_blocks; ++b) {
      const f32v d = load(tokens.scales[v] + b / kScaleBlocks<K> * kTileTokens);
      square[v] = fma(mul(d, d), set1(square_error(row + b * kPreparedBlock)), square[v]);
    }
    any |= any_below(set1(1.0f), square[v]);
  }
  return any;
}

/// Adds what rounding left of the queries to the scores whose errors may be above the limit.
template <typename K, int R, int V>
void refine_scores(const i32 *q, size_t ld_q, const TokenVectors<V> &tokens, int num_blocks,
                   QueryRest<K> (&rests)[R], size_t ld_scores) noexcept {
  for (int r = 0; r < R; ++r, q += ld_q) {
    f32v square[V], sum[V];
    if (!row_errors<K>(q, tokens, num_blocks, square))
      continue;
    for (int v = 0; v < V; ++v)
      sum[v] = load(tokens.scores[v] + at(r, ld_scores, 0));
    for (int b = 0; b < num_blocks; b += QueryRest<K>::kBlocks) {
      const int left = num_blocks - b;
      const int count = left < QueryRest<K>::kBlocks ? left : +QueryRest<K>::kBlocks;
      rests[r].prepare(q, num_blocks, b, count);
      float scores[V][kLanes];
      TokenVectors<V> part = tokens;
      for (int v = 0; v < V; ++v) {
        part.words[v] += b * K::kCodeBytes * kTileTokens;
        part.scales[v] += b / kScaleBlocks<K> * kTileTokens;
        part.scores[v] = scores[v];
      }
      h16v unused = zero_half_bits();
      tile_scores<K, 1>(rests[r].words, 0, part, count, 0, unused);
      for (int v = 0; v < V; ++v)
        sum[v] = select_below(set1(1.0f), square[v], add(sum[v], load(scores[v])), sum[v]);
    }
    for (int v = 0; v < V; ++v)
      store(tokens.scores[v] + at(r, ld_scores, 0), sum[v]);
  }
}

/// V vectors of tokens from vector x on; a short last step has its last vector twice.
template <typename K, int V>
MIXEDKV_INLINE TokenVectors<V> token_vectors(const Rows &tiles, int x, int num_vectors,
                                             int num_blocks, float *scores) {
  TokenVectors<V> tokens;
  for (int v = 0; v < V; ++v) {
    const int vector = x + v < num_vectors ? x + v : num_vectors - 1;
    const uint8_t *tile = tile_at(tiles, vector / kTileVectors);
    const int token = vector % kTileVectors * kLanes;
    tokens.words[v] = tile + token * 4;
    tokens.scales[v] = scale_at<K>(tile, num_blocks, 0, token);
    tokens.scores[v] = scores + vector * kLanes;
  }
  return tokens;
}

template <typename K, int R>
MIXEDKV_RARE void refine_tiles_rows(const i32 *q, size_t ld_q, const Rows &tiles, int num_tiles,
                                    int num_blocks, float *scores, size_t ld_scores) noexcept {
  constexpr int V = kPackedVectors;
  const int n = num_tiles * kTileVectors;
  QueryRest<K> rests[R];
  for (int x = 0; x < n; x += V)
    refine_scores<K, R>(q, ld_q, token_vectors<K, V>(tiles, x, n, num_blocks, scores), num_blocks,
                        rests, ld_scores);
}

template <typename K, int R>
void qk_tiles_rows(const i32 *q, size_t ld_q, const Rows &tiles, int num_tiles, int num_blocks,
                   float *scores, size_t ld_scores) noexcept {
  constexpr int V = kPackedVectors;
  const ptrdiff_t tile_bytes =
      num_blocks * (kTileTokens * K::kCodeBytes + kTileScaleBytes / kScaleBlocks<K>);
  const int n = num_tiles * kTileVectors;
  h16v largest = zero_half_bits();
  for (int x = 0; x < n; x += V) {
    for (int v = x; v < x + V && v < n; ++v)
      if (v % kTileVectors == 0)
        prefetch_tile(tiles, num_tiles, v / kTileVectors + kTilesAsked, 0, tile_bytes);
    tile_scores<K, R>(q, ld_q, token_vectors<K, V>(tiles, x, n, num_blocks, scores), num_blocks,
                      ld_scores, largest);
  }
  if (any_bits_above(largest, scale_limit(q, ld_q, R, num_blocks)))
    refine_tiles_rows<K, R>(q, ld_q, tiles, num_tiles, num_blocks, scores, ld_scores);
}

template <typename K>
void qk_tiles(const float *prepared, int num_rows, const Rows *tiles, int num_tiles, int head_dim,
              float *scores, size_t ld_scores) noexcept {
  const size_t ld = prepared_row(head_dim);
  const int num_blocks = head_dim / kTileBlock;
  for (int r = 0; r < num_rows; r += kPackedRows) {
    const i32 *q = reinterpret_cast<const i32 *>(prepared + static_cast<size_t>(r) * ld);
    float *out = scores + at(r, ld_scores, 0);
    switch (num_rows - r) {
    case 1:
      qk_tiles_rows<K, 1>(q, ld, *tiles, num_tiles, num_blocks, out, ld_scores);
      break;
    case 2:
      qk_tiles_rows<K, 2>(q, ld, *tiles, num_tiles, num_blocks, out, ld_scores);
      break;
    case 3:
      qk_tiles_rows<K, 3>(q, ld, *tiles, num_tiles, num_blocks, out, ld_scores);
      break;
    default:
      qk_tiles_rows<K, kPackedRows>(q, ld, *tiles, num_tiles, num_blocks, out, ld_scores);
    }
  }
}
