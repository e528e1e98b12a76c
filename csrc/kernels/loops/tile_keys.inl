// Packed Q4_0 keys (formats/nibble_tile.h) against a group of query rows, in integers.
//
// Each block of a query row is rounded once to 15 bits, q = s * (128 * hi + lo), two signed
// bytes a dim. Lanes are tokens: a vector of words, split into low and high nibbles, is multiplied
// by four broadcast bytes of hi and of lo at a time. Sums of a block are exact; they are scaled by
// s and the tokens' d. One byte a dim instead of two would leave an error of 5e-3, two leave 1e-4
// and less; one s for the whole row would let a large query channel round the others away, which
// large key channels then show.
//
// Unpacking serves all rows of a group; what a group shares is held in registers.

using i32 = int32_t;

enum : int {
  kWordsOfBlock = QK4_0 / 4,
  /// Prepared form of a block: hi bytes, lo bytes, -8 times the sum of the numbers, and s.
  kPreparedBlock = 2 * kWordsOfBlock + 2,
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
  // Straight to where they go: a wide read of narrow stores would wait for all of them.
  int8_t *bytes = reinterpret_cast<int8_t *>(out);
  i32v total = zero_i32();
  for (int i = 0; i < QK4_0; i += kLanes) {
    const i32v number = to_i32(useful ? mul(load(x + i), inverse) : zero());
    const i32v hi = shift_right_signed<7>(add_i32(number, set1_i32(64)));
    store_bytes(bytes + i, hi);
    store_bytes(bytes + QK4_0 + i, sub_i32(number, shift_left<7>(hi)));
    total = add_i32(total, number);
  }
  out[2 * kWordsOfBlock] = -8 * sum_lanes(total);
  const float scale = odd ? NAN : useful ? largest / kLargest : 0.0f;
  memcpy(out + 2 * kWordsOfBlock + 1, &scale, sizeof scale);
}

void prepare_tile_query(const float *q, size_t ld_q, int num_rows, int head_dim,
                        float *prepared) noexcept {
  for (int r = 0; r < num_rows; ++r) {
    i32 *out = reinterpret_cast<i32 *>(prepared + static_cast<size_t>(r) * prepared_row(head_dim));
    for (int b = 0; b < head_dim / QK4_0; ++b)
      prepare_block(q + at(r, ld_q, b * QK4_0), out + b * kPreparedBlock);
  }
}

// --- qk ----------------------------------------------------------------------------------------

/// Scores of R rows against V vectors of tokens; vector v's words are at words[v], kTileTokens
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
        const i32v x = load_i32(words[v] + b * kNibbleBlockBytes + w * kTileTokens * 4);
        nibbles[w][v] = low_nibbles(x);
        nibbles[w + kWordsOfBlock / 2][v] = high_nibbles(x);
      }
      d[v] = load(scales[v] + b * kTileTokens);
    }
    for (int r = 0; r < R; ++r) {
      const i32 *row = q + static_cast<size_t>(r) * ld_q + b * kPreparedBlock;
      const i32v offset = set1_i32(row[2 * kWordsOfBlock]);
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
          hi[v] = dot(hi[v], nibbles[w][v], x);
          lo[v] = dot(lo[v], nibbles[w][v], y);
        }
      }
      float s;
      memcpy(&s, row + 2 * kWordsOfBlock + 1, sizeof s);
      const f32v scale = set1(s);
      for (int v = 0; v < V; ++v) {
        const i32v total = add_i32(dot_total(lo[v], offset), shift_left<7>(dot_total(hi[v], none)));
        sum[r][v] = fma(to_f32(total), mul(d[v], scale), sum[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      store(scores[v] + at(r, ld_scores, 0), sum[r][v]);
}

template <int R>
void qk_tiles_rows(const i32 *q, size_t ld_q, const Rows &tiles, int num_tiles, int num_blocks,
                   float *scores, size_t ld_scores) noexcept {
  constexpr int V = kPackedVectors;
  const ptrdiff_t tile_bytes = num_blocks * (kNibbleBlockBytes + kTileScaleBytes);
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
      scales[v] = nibble_scale(tile, num_blocks, 0, token);
      out[v] = scores + vector * kLanes;
      if (token == 0)
        prefetch_tile(tiles, num_tiles, vector / kTileVectors + kTilesAsked, 0, tile_bytes);
    }
    packed_scores<R, V>(q, ld_q, words, scales, num_blocks, out, ld_scores);
  }
}

[[maybe_unused]] // an ISA may have its own
void qk_tiles(const float *prepared, int num_rows, const Rows *tiles, int num_tiles, int head_dim,
               float *scores, size_t ld_scores) noexcept {
  const size_t ld = prepared_row(head_dim);
  const int num_blocks = head_dim / QK4_0;
  for (int r = 0; r < num_rows; r += kPackedRows) {
    const i32 *q = reinterpret_cast<const i32 *>(prepared + static_cast<size_t>(r) * ld);
    float *out = scores + at(r, ld_scores, 0);
    switch (num_rows - r) {
    case 1:
      qk_tiles_rows<1>(q, ld, *tiles, num_tiles, num_blocks, out, ld_scores);
      break;
    case 2:
      qk_tiles_rows<2>(q, ld, *tiles, num_tiles, num_blocks, out, ld_scores);
      break;
    case 3:
      qk_tiles_rows<3>(q, ld, *tiles, num_tiles, num_blocks, out, ld_scores);
      break;
    default:
      qk_tiles_rows<kPackedRows>(q, ld, *tiles, num_tiles, num_blocks, out, ld_scores);
    }
  }
}
