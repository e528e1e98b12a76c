// How a block's numbers of a query row are multiplied by codes of keys in token tiles, exactly:
// what the Products of loops/tile_keys.inl may be. They say
//
//   kLargest              largest magnitude of a number
//   put(out, i, number)   a vector of numbers, from dim i of the block on, into its kNumberWords
//   arrange(x)            words of codes into the order that add_up wants them in, before opening
//   add_up(numbers, codes, totals)   totals[v] = the sum of numbers times codes[v], lane by lane

using i32 = int32_t;

enum : int {
  kTileBlock = 32, ///< values of a block; two of them share a scale where blocks are larger
  kWordsOfBlock = kTileBlock / 4,
  kNumberWords = 2 * kWordsOfBlock,
};

/// Of keys K or values V of a format: blocks that share a scale.
template <typename KV> constexpr int kScaleBlocks = 1;

/// Words of keys that K::open takes; where these are more than lie in a tile, K::complete makes the
/// others.
template <typename K> constexpr int kOpenWords = K::kCodeBytes / 4;

/// Where the scale of a token's block is.
template <typename KV>
MIXEDKV_INLINE const f16_t *scale_at(const uint8_t *tile, int num_blocks, int block, int token) {
  return tile_scale(tile, KV::kCodeBytes * kScaleBlocks<KV>, num_blocks / kScaleBlocks<KV>,
                    block / kScaleBlocks<KV>, token);
}

#if !defined(MIXEDKV_I8MM)
/// Numbers of 15 bits, 128 * hi + lo: hi bytes, then lo bytes, each multiplied by bytes of codes.
struct ByteProducts {
  static constexpr int kLargest = 127 * 128;
  MIXEDKV_INLINE static void put(i32 *out, int i, i32v number) {
    // Straight to where they go: a wide read of narrow stores would wait for all of them.
    int8_t *bytes = reinterpret_cast<int8_t *>(out);
    const i32v hi = shift_right_signed<7>(add_i32(number, set1_i32(64)));
    store_bytes(bytes + i, hi);
    store_bytes(bytes + kTileBlock + i, sub_i32(number, shift_left<7>(hi)));
  }
  template <int N> MIXEDKV_INLINE static void arrange(i32v (&)[N]) {}
  template <int V>
  MIXEDKV_INLINE static void add_up(const i32 *numbers, i32 start,
                                    const i32v (&codes)[V][kWordsOfBlock], i32v (&totals)[V]) {
    const i32v offset = set1_i32(start);
    const i32v none = zero_i32();
    Dot hi[V], lo[V];
    for (int v = 0; v < V; ++v) {
      hi[v] = dot_from(none);
      lo[v] = dot_from(offset);
    }
    for (int w = 0; w < kWordsOfBlock; ++w) {
      const i32v x = set1_i32(numbers[w]);
      const i32v y = set1_i32(numbers[kWordsOfBlock + w]);
      for (int v = 0; v < V; ++v) {
        hi[v] = dot(hi[v], codes[v][w], x);
        lo[v] = dot(lo[v], codes[v][w], y);
      }
    }
    for (int v = 0; v < V; ++v)
      totals[v] = add_i32(dot_total(lo[v], offset), shift_left<7>(dot_total(hi[v], none)));
  }
};
#else
/// The same numbers by smmla (FEAT_I8MM), which multiplies two rows of eight bytes by two others:
/// two tokens by eight hi bytes and the eight lo bytes of the same dims, whose products are wanted
/// side by side anyway. That is twice as many products an instruction as sdot has, 8 for a block of
/// four tokens and a query row instead of 16, for the zips of words that all rows share.
struct ByteProducts {
  static constexpr int kLargest = 127 * 128;
  MIXEDKV_INLINE static void put(i32 *out, int i, i32v number) {
    int8_t *bytes = reinterpret_cast<int8_t *>(out) + i / 8 * 16 + i % 8;
    const i32v hi = shift_right_signed<7>(add_i32(number, set1_i32(64)));
    store_bytes(bytes, hi);
    store_bytes(bytes + 8, sub_i32(number, shift_left<7>(hi)));
  }
  /// Two words of a token side by side: of two tokens, then of the two others.
  template <int N> MIXEDKV_INLINE static void arrange(i32v (&x)[N]) {
    for (int w = 0; w < N; w += 2) {
      const i32v a = x[w], b = x[w + 1];
      x[w] = vzip1q_s32(a, b);
      x[w + 1] = vzip2q_s32(a, b);
    }
  }
  template <int V>
  MIXEDKV_INLINE static void add_up(const i32 *numbers, i32 start,
                                    const i32v (&codes)[V][kWordsOfBlock], i32v (&totals)[V]) {
    i32v sum[V][2];
    for (int v = 0; v < V; ++v)
      sum[v][0] = sum[v][1] = zero_i32();
    for (int w = 0; w < kWordsOfBlock; w += 2) {
      const int8x16_t y = vreinterpretq_s8_s32(load_i32(numbers + w * 2));
      for (int v = 0; v < V; ++v)
        for (int p = 0; p < 2; ++p)
          sum[v][p] = vmmlaq_s32(sum[v][p], vreinterpretq_s8_s32(codes[v][w + p]), y);
    }
    for (int v = 0; v < V; ++v) {
      const i32v hi = vuzp1q_s32(sum[v][0], sum[v][1]);
      const i32v lo = vuzp2q_s32(sum[v][0], sum[v][1]);
      totals[v] = add_i32(add_i32(lo, set1_i32(start)), shift_left<7>(hi));
    }
  }
};
#endif

/// Numbers of 16 bits, those of even and of odd dims of a word in pairs, multiplied by halves: for
/// unsigned codes of 8 bits where dot can't take them.
struct HalfProducts {
  static constexpr int kLargest = 32767;
  MIXEDKV_INLINE static void put(i32 *out, int i, i32v number) {
    int16_t halves[kLanes];
    store_halves(halves, number);
    int16_t *to = reinterpret_cast<int16_t *>(out) + i;
    for (int j = 0; j < kLanes; j += 4) {
      to[j] = halves[j];
      to[j + 1] = halves[j + 2];
      to[j + 2] = halves[j + 1];
      to[j + 3] = halves[j + 3];
    }
  }
  template <int N> MIXEDKV_INLINE static void arrange(i32v (&)[N]) {}
  template <int V>
  MIXEDKV_INLINE static void add_up(const i32 *numbers, i32 start,
                                    const i32v (&codes)[V][kWordsOfBlock], i32v (&totals)[V]) {
    const i32v even_bytes = set1_i32(0x00ff00ff);
    for (int v = 0; v < V; ++v)
      totals[v] = set1_i32(start);
    for (int w = 0; w < kWordsOfBlock; ++w) {
      const i32v x = set1_i32(numbers[2 * w]);
      const i32v y = set1_i32(numbers[2 * w + 1]);
      for (int v = 0; v < V; ++v) {
        totals[v] = madd16(totals[v], and_i32(codes[v][w], even_bytes), x);
        totals[v] = madd16(totals[v], high_bytes(codes[v][w]), y);
      }
    }
  }
};

/// For codes of 8 bits: those from -128 to 127, or 128 more where that is what instructions want.
template <bool Bytes> struct WideProducts { using type = ByteProducts; };
template <> struct WideProducts<false> { using type = HalfProducts; };
constexpr bool kSignedCodes = kByteDots && kSignedDots;
