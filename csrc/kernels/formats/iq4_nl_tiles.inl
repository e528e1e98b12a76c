// IQ4_NL in token tiles: Q4_0's layout (formats/nibble_tile.h), nibbles as ggml has them. Each is
// looked up in a table of levels, bytes that go on as those of q8_0_tiles.inl do.

/// Levels as bytes, `more` added.
struct LevelBytes {
  uint8_t of[16];
  constexpr explicit LevelBytes(int more) : of() {
    for (int i = 0; i < 16; ++i)
      of[i] = static_cast<uint8_t>(kLevelsIq4Nl[i] + more);
  }
};
constexpr LevelBytes kLevelsUp{128};

struct Iq4NlKeys {
  static constexpr int kCodeBytes = kNibbleCodeBytes;
  static constexpr int kOffset = kSignedCodes ? 0 : 128;
  static constexpr int kLargestCode = 127;
  static constexpr LevelBytes kOpened{kOffset};
  using Products = WideProducts<kByteDots>::type;
  MIXEDKV_INLINE static void open(const i32v (&x)[4], i32v (&codes)[kWordsOfBlock]) {
    const i32v table = load_table(kOpened.of);
    for (int w = 0; w < 4; ++w) {
      codes[w] = look_up(table, low_nibbles(x[w]));
      codes[w + 4] = look_up(table, high_nibbles(x[w]));
    }
  }
};

struct Iq4NlValues {
  static constexpr int kCodeBytes = kNibbleCodeBytes;
  static constexpr int kOffset = 128;
  static constexpr int kWordTokens = 8;
  static constexpr int kHighShift = 0;
  MIXEDKV_INLINE static i32v open(i32v x) { return x; }
  /// Nibbles P and P + 4 of a word.
  template <int P> MIXEDKV_INLINE static i32v pair(i32v x) {
    const i32v codes =
        look_up(load_table(kLevelsUp.of), P % 2 == 0 ? low_nibbles(x) : high_nibbles(x));
    return P < 2 ? and_i32(codes, set1_i32(0x00ff00ff)) : high_bytes(codes);
  }
  static int code(const uint8_t *tile, int num_blocks, int block, int i, int token) {
    uint32_t word;
    memcpy(&word, tile + ((token / 8 * num_blocks + block) * QK4_NL + i) * 4, sizeof word);
    return kLevelsIq4Nl[word >> nibble_shift(token) & 15u];
  }
};

struct Iq4NlTiles {
  using Block = block_iq4_nl;
  static constexpr uint8_t kFlipKeys = 0, kFlipValues = 0;
  template <typename T, typename F> MIXEDKV_INLINE static void quantize(F source, Block *y) {
    for (int first = 0; first < kTileTokens; first += kLanes)
      quantize_blocks([=](int i) { return source(first + i); }, kLanes, y + first);
  }
};

constexpr TileKernels make_tiles_iq4_nl() {
  TileKernels k = any_tiles<Iq4NlTiles, Iq4NlKeys, Iq4NlValues>();
  k.pack_values_f32 = pack_nibbles<float, Iq4NlTiles>;
  k.pack_values_f16 = pack_nibbles<f16_t, Iq4NlTiles>;
  return k;
}
