// NL3 in token tiles (formats/nl3_tile.h). What nibbles' top bits hold is brought together with two
// shifts and a merge a word; then nibbles are looked up as IQ4_NL's are, whatever their top bits
// say, since each level is there twice.

struct Nl3Keys {
  static constexpr int kCodeBytes = kNl3CodeBytes;
  static constexpr int kOffset = kSignedCodes ? 0 : 128;
  static constexpr int kLargestCode = 127;
  using Products = WideProducts<kByteDots>::type;
  MIXEDKV_INLINE static void complete(i32v (&x)[4]) {
    x[3] = merge_i32(
        set1_i32(0x11111111), shift_right_signed<3>(x[0]),
        merge_i32(set1_i32(0x22222222), shift_right_signed<2>(x[1]), shift_right_signed<1>(x[2])));
  }
  MIXEDKV_INLINE static void open(const i32v (&x)[4], i32v (&codes)[kWordsOfBlock]) {
    const i32v table = load_table(SearchNl3::kTable.bytes[kOffset != 0]);
    for (int w = 0; w < 4; ++w) {
      codes[w] = look_up(table, low_nibbles(x[w]));
      codes[w + 4] = look_up(table, high_nibbles(x[w]));
    }
  }
};
template <> constexpr int kOpenWords<Nl3Keys> = 4;

struct Nl3Values {
  static constexpr int kCodeBytes = kNl3CodeBytes;
  static constexpr int kOffset = 128;
  static constexpr int kWordTokens = kTileTokens;
  static constexpr int kHighShift = 0;
  /// Levels of four tokens each, in byte_tile.h's order.
  struct Opened {
    i32v codes[4];
  };
  /// Values `dim` on of a block.
  MIXEDKV_INLINE static Opened open_block(const uint8_t *block, int dim) {
    const i32v table = load_table(SearchNl3::kTable.bytes[1]);
    const i32v a = load_i32(block + dim * 4);
    const i32v both = load_i32(block + (kTileBlock + dim % 16) * 4);
    const i32v b = dim < 16 ? both : shift_right_signed<4>(both);
    const i32v c = merge_i32(
        set1_i32(0x01010101), shift_right_signed<3>(a),
        merge_i32(set1_i32(0x02020202), shift_right_signed<6>(a), shift_right_signed<1>(b)));
    return {{look_up(table, low_nibbles(a)), look_up(table, high_nibbles(a)),
             look_up(table, low_nibbles(b)), look_up(table, low_nibbles(c))}};
  }
  template <int P> MIXEDKV_INLINE static i32v pair(const Opened &x) {
    return P % 2 == 0 ? and_i32(x.codes[P / 2], set1_i32(0x00ff00ff)) : high_bytes(x.codes[P / 2]);
  }
  static int code(const uint8_t *tile, int, int block, int i, int token) {
    return kLevelsNl3[nl3_value(tile + block * kNl3BlockBytes, i, token)];
  }
};

struct Nl3Tiles {
  using Block = block_nl3;
  static constexpr uint8_t kFlipValues = 0;
  template <typename T, typename F> MIXEDKV_INLINE static void quantize(F source, Block *y) {
    for (int first = 0; first < kTileTokens; first += kLanes)
      quantize_blocks([=](int i) { return source(first + i); }, kLanes, y + first);
  }
};

template <typename T>
void pack_nl3_keys(const void *const *rows, int head_dim, void *tile) noexcept {
  uint8_t *bytes = static_cast<uint8_t *>(tile);
  const int num_blocks = head_dim / kTileBlock;
  block_nl3 blocks[kTileTokens];
  for (int b = 0; b < num_blocks; ++b) {
    tile_blocks<T, Nl3Tiles>(rows, b, blocks);
    for (int t = 0; t < kTileTokens; ++t)
      for (int w = 0; w < 3 && rows[t]; ++w)
        memcpy(bytes + ((b * 3 + w) * kTileTokens + t) * 4, blocks[t].qs + 4 * w, 4);
    pack_scales(rows, blocks, tile_scale(bytes, kNl3CodeBytes, num_blocks, b, 0));
  }
}

/// Sixteen words of which `keep` stays; the rest is the bytes' business.
MIXEDKV_INLINE void pack_nl3_words(const uint8_t (&bytes)[4][16], uint32_t keep, uint8_t *words) {
  b16 x[4];
  for (int p = 0; p < 4; ++p)
    x[p] = load_b16(bytes[p]);
  pack_words(x, keep, words);
}

template <typename T>
void pack_nl3_values(const void *const *rows, int head_dim_v, void *tile) noexcept {
  uint8_t *bytes = static_cast<uint8_t *>(tile);
  const int num_blocks = head_dim_v / kTileBlock;
  uint32_t keep_a = 0, keep_b = 0; // what tokens that aren't there have in words
  for (int t = 0; t < kTileTokens; ++t) {
    const int shift = 8 * byte_of_token(t);
    if (rows[t])
      continue;
    keep_a |= (t < 4 ? 0x07u : t < 8 ? 0x70u : t < 12 ? 0u : 0x88u) << shift;
    keep_b |= (t < 8 ? 0u : t < 12 ? 0x77u : 0x88u) << shift;
  }
  block_nl3 blocks[kTileTokens];
  for (int b = 0; b < num_blocks; ++b) {
    tile_blocks<T, Nl3Tiles>(rows, b, blocks);
    // Numbers of levels, of the first and of the second sixteen values.
    uint8_t of[kTileTokens][2][16];
    for (int t = 0; t < kTileTokens; ++t) {
      uint32_t w[4];
      memcpy(w, blocks[t].qs, sizeof blocks[t].qs);
      w[3] = (w[0] >> 3 & 0x11111111u) | (w[1] >> 2 & 0x22222222u) | (w[2] >> 1 & 0x44444444u);
      for (int i = 0; i < 4; ++i) {
        const uint32_t low = w[i] & 0x07070707u, high = w[i] >> 4 & 0x07070707u;
        memcpy(of[t][0] + 4 * i, &low, 4);
        memcpy(of[t][1] + 4 * i, &high, 4);
      }
      if (!rows[t])
        memset(of[t], 0, sizeof of[t]);
    }
    uint8_t *words = bytes + b * kNl3BlockBytes;
    uint8_t x[4][16];
    for (int half = 0; half < 2; ++half) {
      for (int t = 0; t < 4; ++t)
        for (int i = 0; i < 16; ++i)
          x[byte_of_token(t)][i] =
              static_cast<uint8_t>(of[t][half][i] | of[4 + t][half][i] << 4 |
                                   (of[12 + t][half][i] & 1) << 3 | (of[12 + t][half][i] & 2) << 6);
      pack_nl3_words(x, keep_a, words + half * 64);
    }
    for (int t = 0; t < 4; ++t)
      for (int i = 0; i < 16; ++i)
        x[byte_of_token(t)][i] =
            static_cast<uint8_t>(of[8 + t][0][i] | of[8 + t][1][i] << 4 |
                                 (of[12 + t][0][i] & 4) << 1 | (of[12 + t][1][i] & 4) << 5);
    pack_nl3_words(x, keep_b, words + 128);
    pack_scales(rows, blocks, tile_scale(bytes, kNl3CodeBytes, num_blocks, b, 0));
  }
}

constexpr TileKernels make_tiles_nl3() {
  TileKernels k{};
  k.prepare_query = prepare_tile_query<Nl3Keys>;
  k.qk = qk_tiles<Nl3Keys>;
  k.pv = pv_tiles<Nl3Values>;
  k.values_to_f32 = any_values_to_f32<Nl3Values>;
  k.keys_to_f32 = any_keys_to_f32<Nl3Keys>;
  k.pack_keys_f32 = pack_nl3_keys<float>;
  k.pack_keys_f16 = pack_nl3_keys<f16_t>;
  k.pack_values_f32 = pack_nl3_values<float>;
  k.pack_values_f16 = pack_nl3_values<f16_t>;
#if defined(MIXEDKV_BF16)
  k.key_panel = any_key_panel<Nl3Keys>;
  k.value_panels = any_value_panels<Nl3Values>;
#endif
  return k;
}
