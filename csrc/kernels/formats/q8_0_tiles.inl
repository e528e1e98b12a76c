// Q8_0 in token tiles: how its bytes are opened (formats/byte_tile.h).

struct Q8_0Keys {
  static constexpr int kCodeBytes = kByteCodeBytes;
  static constexpr int kOffset = kSignedCodes ? 0 : 128;
  static constexpr int kLargestCode = 127;
  using Products = WideProducts<kByteDots>::type;
  MIXEDKV_INLINE static void open(const i32v (&x)[8], i32v (&codes)[kWordsOfBlock]) {
    for (int w = 0; w < 8; ++w)
      codes[w] = kSignedCodes ? xor_i32(x[w], set1_i32(static_cast<int32_t>(0x80808080u))) : x[w];
  }
};

struct Q8_0Values {
  static constexpr int kCodeBytes = kByteCodeBytes;
  static constexpr int kOffset = 128;
  static constexpr int kWordTokens = 4;
  static constexpr int kHighShift = 0;
  MIXEDKV_INLINE static i32v open(i32v x) { return x; }
  template <int P> MIXEDKV_INLINE static i32v pair(i32v x) {
    return P == 0 ? and_i32(x, set1_i32(0x00ff00ff)) : high_bytes(x);
  }
  static int code(const uint8_t *tile, int num_blocks, int block, int i, int token) {
    return tile[((token / 4 * num_blocks + block) * QK8_0 + i) * 4 + byte_of_token(token)] - 128;
  }
};

struct Q8_0Tiles {
  using Block = block_q8_0;
  static constexpr uint8_t kFlipKeys = 0x80, kFlipValues = 0x80;
  template <typename T, typename F> MIXEDKV_INLINE static void quantize(F source, Block *y) {
    for (int first = 0; first < kTileTokens; first += kLanes)
      quantize_blocks([=](int i) { return source(first + i); }, kLanes, y + first);
  }
};

constexpr TileKernels make_tiles_q8_0() {
  TileKernels k = any_tiles<Q8_0Tiles, Q8_0Keys, Q8_0Values>();
  k.pack_values_f32 = pack_bytes<float, Q8_0Tiles>;
  k.pack_values_f16 = pack_bytes<f16_t, Q8_0Tiles>;
  return k;
}
