// NL4 in token tiles: IQ4_NL's words (formats/nibble_tile.h), two blocks of 32 to a scale.

struct Nl4Keys {
  static constexpr int kCodeBytes = kNibbleCodeBytes;
  static constexpr int kOffset = kSignedCodes ? 0 : 128;
  static constexpr int kLargestCode = 127;
  using Products = WideProducts<kByteDots>::type;
  MIXEDKV_INLINE static void open(const i32v (&x)[4], i32v (&codes)[kWordsOfBlock]) {
    const i32v table = load_table(SearchNl4::kTable.bytes[kOffset != 0]);
    for (int w = 0; w < 4; ++w) {
      codes[w] = look_up(table, low_nibbles(x[w]));
      codes[w + 4] = look_up(table, high_nibbles(x[w]));
    }
  }
};
template <> constexpr int kScaleBlocks<Nl4Keys> = 2;

struct Nl4Values {
  static constexpr int kCodeBytes = kNibbleCodeBytes;
  static constexpr int kOffset = 128;
  static constexpr int kWordTokens = 8;
  static constexpr int kHighShift = 0;
  MIXEDKV_INLINE static i32v open(i32v x) { return x; }
  /// Nibbles P and P + 4 of a word.
  template <int P> MIXEDKV_INLINE static i32v pair(i32v x) {
    const i32v codes = look_up(load_table(SearchNl4::kTable.bytes[1]),
                               P % 2 == 0 ? low_nibbles(x) : high_nibbles(x));
    return P < 2 ? and_i32(codes, set1_i32(0x00ff00ff)) : high_bytes(codes);
  }
  static int code(const uint8_t *tile, int num_blocks, int block, int i, int token) {
    uint32_t word;
    memcpy(&word, tile + ((token / 8 * num_blocks + block) * kTileBlock + i) * 4, sizeof word);
    return kLevelsNl4[word >> nibble_shift(token) & 15u];
  }
};
template <> constexpr int kScaleBlocks<Nl4Values> = 2;

struct Nl4Tiles {
  using Block = block_nl4;
  static constexpr uint8_t kFlipKeys = 0, kFlipValues = 0;
  template <typename T, typename F> MIXEDKV_INLINE static void quantize(F source, Block *y) {
    for (int first = 0; first < kTileTokens; first += kLanes)
      quantize_blocks([=](int i) { return source(first + i); }, kLanes, y + first);
  }
};

constexpr TileKernels make_tiles_nl4() {
  TileKernels k = any_tiles<Nl4Tiles, Nl4Keys, Nl4Values>();
  k.pack_values_f32 = pack_nibbles<float, Nl4Tiles>;
  k.pack_values_f16 = pack_nibbles<f16_t, Nl4Tiles>;
  return k;
}
