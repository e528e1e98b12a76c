// Keys in token tiles (formats/token_tile.h) against a group of query rows, in integers.
//
// Each block of a query row is rounded once to a sign and 14 bits of magnitude or more, q = s * n.
// Lanes are tokens: codes of four dims to a 32-bit word are multiplied by the row's numbers of these
// dims, all of them broadcast, and add up within their lane. Sums of a block are exact; they are
// scaled by s and the tokens' d. Rounding to 8 bits would leave an error of 5e-3; one s for the whole
// row would let a large query channel round the others away, which large key channels then show.
//
// Unpacking serves all rows of a group; what a group shares is held in registers.
//
// A format says how its codes are opened, in a struct K:
//
//   kCodeBytes            bytes of a block's codes
//   kOffset               opened codes are the format's plus this
//   Products              ByteProducts<K> or HalfProducts<K>: what its codes are multiplied by
//   open(words, codes)    the codes of a vector of tokens, whose first words are at `words`, as bytes
//                         that dot (ByteProducts) or halves_of_even_bytes (HalfProducts) takes:
//                         codes[w] has dims 4 w to 4 w + 3 of its block

using i32 = int32_t;

enum : int {
  kTileBlock = 32, ///< values of a block, in every format that has tiles
  kWordsOfBlock = kTileBlock / 4,
  /// Prepared form of a block: its numbers, what is added for -kOffset times their sum, and s.
  kNumberWords = 2 * kWordsOfBlock,
  kPreparedBlock = kNumberWords + 2,
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

/// A row: num_blocks * kPreparedBlock words.
MIXEDKV_INLINE size_t prepared_row(int head_dim) {
  return tile_query_floats(static_cast<size_t>(head_dim));
}

/// Numbers of 15 bits, 128 * hi + lo: hi bytes, then lo bytes, each multiplied by bytes of codes.
template <typename K> struct ByteProducts {
  static constexpr int kLargest = 127 * 128;
  MIXEDKV_INLINE static void put(i32 *out, int i, i32v number) {
    // Straight to where they go: a wide read of narrow stores would wait for all of them.
    int8_t *bytes = reinterpret_cast<int8_t *>(out);
    const i32v hi = shift_right_signed<7>(add_i32(number, set1_i32(64)));
    store_bytes(bytes + i, hi);
    store_bytes(bytes + kTileBlock + i, sub_i32(number, shift_left<7>(hi)));
  }
  /// totals[v] = the sum of numbers times codes of a block.
  template <int V>
  MIXEDKV_INLINE static void add_up(const i32 *row, const i32v (&codes)[V][kWordsOfBlock],
                                    i32v (&totals)[V]) {
    const i32v offset = set1_i32(row[kNumberWords]);
    const i32v none = zero_i32();
    Dot hi[V], lo[V];
    for (int v = 0; v < V; ++v) {
      hi[v] = dot_from(none);
      lo[v] = dot_from(offset);
    }
    for (int w = 0; w < kWordsOfBlock; ++w) {
      const i32v x = set1_i32(row[w]);
      const i32v y = set1_i32(row[kWordsOfBlock + w]);
      for (int v = 0; v < V; ++v) {
        hi[v] = dot(hi[v], codes[v][w], x);
        lo[v] = dot(lo[v], codes[v][w], y);
      }
    }
    for (int v = 0; v < V; ++v)
      totals[v] = add_i32(dot_total(lo[v], offset), shift_left<7>(dot_total(hi[v], none)));
  }
};

template <typename K> MIXEDKV_INLINE void prepare_block(const float *x, i32 *out) {
  f32v largest_of = zero();
  bool odd = false;
  for (int i = 0; i < kTileBlock; i += kLanes) {
    odd |= any_not_finite(load(x + i));
    largest_of = max_or_second(abs_of(load(x + i)), largest_of);
  }
  const float largest = max_lanes(largest_of);
  constexpr float kLargest = K::Products::kLargest;
  // What is too small to be inverted contributes nothing that f32 scores could show.
  const bool useful = !odd && largest > 1e-30f;
  const f32v inverse = set1(useful ? kLargest / largest : 0.0f);
  i32v total = zero_i32();
  for (int i = 0; i < kTileBlock; i += kLanes) {
    const i32v number = to_i32(useful ? mul(load(x + i), inverse) : zero());
    K::Products::put(out, i, number);
    total = add_i32(total, number);
  }
  out[kNumberWords] = -K::kOffset * sum_lanes(total);
  const float scale = odd ? NAN : useful ? largest / kLargest : 0.0f;
  memcpy(out + kNumberWords + 1, &scale, sizeof scale);
}

template <typename K>
void prepare_tile_query(const float *q, size_t ld_q, int num_rows, int head_dim,
                        float *prepared) noexcept {
  for (int r = 0; r < num_rows; ++r) {
    i32 *out = reinterpret_cast<i32 *>(prepared + static_cast<size_t>(r) * prepared_row(head_dim));
    for (int b = 0; b < head_dim / kTileBlock; ++b)
      prepare_block<K>(q + at(r, ld_q, b * kTileBlock), out + b * kPreparedBlock);
  }
}

// --- qk ----------------------------------------------------------------------------------------

/// Scores of R rows against V vectors of tokens; vector v's words are at words[v], kTileTokens
/// apart, its scales at scales[v].
template <typename K, int R, int V>
MIXEDKV_INLINE void tile_scores(const i32 *q, size_t ld_q, const uint8_t *const (&words)[V],
                                const f16_t *const (&scales)[V], int num_blocks,
                                float *const (&scores)[V], size_t ld_scores) {
  f32v sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      sum[r][v] = zero();
  for (int b = 0; b < num_blocks; ++b) {
    i32v codes[V][kWordsOfBlock];
    f32v d[V];
    for (int v = 0; v < V; ++v) {
      K::open(words[v] + b * kTileTokens * K::kCodeBytes, codes[v]);
      d[v] = load(scales[v] + b * kTileTokens);
    }
    for (int r = 0; r < R; ++r) {
      const i32 *row = q + static_cast<size_t>(r) * ld_q + b * kPreparedBlock;
      i32v totals[V];
      K::Products::add_up(row, codes, totals);
      float s;
      memcpy(&s, row + kNumberWords + 1, sizeof s);
      const f32v scale = set1(s);
      for (int v = 0; v < V; ++v)
        sum[r][v] = fma(to_f32(totals[v]), mul(d[v], scale), sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      store(scores[v] + at(r, ld_scores, 0), sum[r][v]);
}

template <typename K, int R>
void qk_tiles_rows(const i32 *q, size_t ld_q, const Rows &tiles, int num_tiles, int num_blocks,
                   float *scores, size_t ld_scores) noexcept {
  constexpr int V = kPackedVectors;
  const ptrdiff_t tile_bytes = num_blocks * (kTileTokens * K::kCodeBytes + kTileScaleBytes);
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
      scales[v] = tile_scale(tile, K::kCodeBytes, num_blocks, 0, token);
      out[v] = scores + vector * kLanes;
      if (token == 0)
        prefetch_tile(tiles, num_tiles, vector / kTileVectors + kTilesAsked, 0, tile_bytes);
    }
    tile_scores<K, R, V>(q, ld_q, words, scales, num_blocks, out, ld_scores);
  }
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
