// Q4_0 in token tiles: how its nibbles are opened (formats/nibble_tile.h).

struct Q4_0Keys {
  static constexpr int kCodeBytes = kNibbleCodeBytes;
  static constexpr int kOffset = 8;
  static constexpr int kLargestCode = 8;
  using Products = ByteProducts;
  MIXEDKV_INLINE static void open(const i32v (&x)[4], i32v (&codes)[kWordsOfBlock]) {
    for (int w = 0; w < 4; ++w) {
      codes[w] = low_nibbles(x[w]);
      codes[w + 4] = high_nibbles(x[w]);
    }
  }
};

/// Nibbles are not brought to the bottom of their halves: of each byte the low one counts once, the
/// high one 16 times, in sums of their own, and what makes them unsigned is taken off at the start.
/// So four pairs of nibbles cost one shift beside the masks, which most processors do twice as
/// often.
struct Q4_0Values {
  static constexpr int kCodeBytes = kNibbleCodeBytes;
  static constexpr int kOffset = 8;
  static constexpr int kWordTokens = 8;
  static constexpr int kHighShift = 4;
  MIXEDKV_INLINE static i32v open(i32v x) {
    return xor_i32(x, set1_i32(static_cast<int32_t>(0x88888888u)));
  }
  template <int P> MIXEDKV_INLINE static i32v pair(i32v x) {
    return and_i32(P < 2 ? x : high_bytes(x), set1_i32(P % 2 == 0 ? 0x000f000f : 0x00f000f0));
  }
  static int code(const uint8_t *tile, int num_blocks, int block, int i, int token) {
    uint32_t word;
    memcpy(&word, tile + (token / 8 * num_blocks * QK4_0 + block * QK4_0 + i) * 4, sizeof word);
    return static_cast<int>((word >> nibble_shift(token) & 15u) ^ 8u) - 8;
  }
};

struct Q4_0Tiles {
  using Block = block_q4_0;
  static constexpr uint8_t kFlipKeys = 0, kFlipValues = 0x88;
  template <typename T, typename F> MIXEDKV_INLINE static void quantize(F source, Block *y) {
    for (int first = 0; first < kTileTokens; first += kQuantBlocks)
      quantize_group<T>([=](int i) { return source(first + i); }, y + first);
  }
};

// --- as f32 ------------------------------------------------------------------------------------

template <int K> MIXEDKV_INLINE f32v signed_nibble(i32v x) {
  return to_f32(shift_right_signed<28>(shift_left<28 - 4 * K>(x)));
}

template <int K> MIXEDKV_INLINE void unpack_key_nibbles(i32v x, f32v d, float *dims) {
  constexpr int dim = K / 2 + K % 2 * (QK4_0 / 2);
  store(dims + dim * kTileTokens, mul(signed_nibble<K>(x), d));
  if constexpr (K < 7)
    unpack_key_nibbles<K + 1>(x, d, dims);
}

void tile_keys_to_f32(const void *tile, int head_dim, float *kt) noexcept {
  const uint8_t *bytes = static_cast<const uint8_t *>(tile);
  const int num_blocks = head_dim / QK4_0;
  const i32v flip = set1_i32(static_cast<int32_t>(0x88888888));
  for (int b = 0; b < num_blocks; ++b)
    for (int token = 0; token < kTileTokens; token += kLanes) {
      const f32v d = load(nibble_scale(bytes, num_blocks, b, token));
      for (int w = 0; w < 4; ++w) {
        const i32v x = load_i32(bytes + b * kNibbleBlockBytes + (w * kTileTokens + token) * 4);
        unpack_key_nibbles<0>(xor_i32(x, flip), d, kt + (b * QK4_0 + w * 4) * kTileTokens + token);
      }
    }
}

template <int K>
MIXEDKV_INLINE void unpack_value_nibbles(i32v x, const float *d, float *values, size_t ld) {
  constexpr int token = K % 4 * 2 + K / 4;
  store(values + static_cast<size_t>(token) * ld, mul(signed_nibble<K>(x), set1(d[token])));
  if constexpr (K < 7)
    unpack_value_nibbles<K + 1>(x, d, values, ld);
}

void tile_values_to_f32(const void *tile, int head_dim_v, float *values) noexcept {
  const uint8_t *bytes = static_cast<const uint8_t *>(tile);
  const int num_blocks = head_dim_v / QK4_0;
  const size_t ld = static_cast<size_t>(head_dim_v);
  for (int b = 0; b < num_blocks; ++b) {
    float d[kTileTokens];
    f16_to_f32(nibble_scale(bytes, num_blocks, b, 0), d, kTileTokens);
    for (int g = 0; g < 2; ++g)
      for (int i = b * QK4_0; i < (b + 1) * QK4_0; i += kLanes)
        unpack_value_nibbles<0>(load_i32(bytes + (g * head_dim_v + i) * 4), d + g * 8,
                                values + static_cast<size_t>(g) * 8 * ld + i, ld);
  }
}

#if defined(MIXEDKV_BF16)
// --- as panels of bf16 ---------------------------------------------------------------------------

/// Nibbles K and K + 2 of a word are dims that follow one another.
template <int K> MIXEDKV_INLINE void store_key_pair(i32v x, f32v d, bf16_t *dims) {
  constexpr int dim = K / 2 + K % 2 * (QK4_0 / 2);
  store_i32(dims + dim * kPanelColumns,
            round_interleaved(mul(signed_nibble<K>(x), d), mul(signed_nibble<K + 2>(x), d)));
}

void tile_key_panel(const void *tile, int head_dim, bf16_t *panel) noexcept {
  const uint8_t *bytes = static_cast<const uint8_t *>(tile);
  const int num_blocks = head_dim / QK4_0;
  const i32v flip = set1_i32(static_cast<int32_t>(0x88888888));
  for (int b = 0; b < num_blocks; ++b)
    for (int token = 0; token < kTileTokens; token += kLanes) {
      const f32v d = load(nibble_scale(bytes, num_blocks, b, token));
      for (int w = 0; w < 4; ++w) {
        const i32v x =
            xor_i32(load_i32(bytes + b * kNibbleBlockBytes + (w * kTileTokens + token) * 4), flip);
        bf16_t *dims = panel + (b * QK4_0 + w * 4) * kPanelColumns + 2 * token;
        store_key_pair<0>(x, d, dims);
        store_key_pair<1>(x, d, dims);
        store_key_pair<4>(x, d, dims);
        store_key_pair<5>(x, d, dims);
      }
    }
}

/// Nibbles K and K + 4 of a word are tokens 2 K and 2 K + 1.
template <int K> MIXEDKV_INLINE void store_value_pairs(i32v x, const float *d, bf16_t *pairs) {
  store_i32(pairs + K * 2 * kPanelColumns,
            round_interleaved(mul(signed_nibble<K>(x), set1(d[2 * K])),
                              mul(signed_nibble<K + 4>(x), set1(d[2 * K + 1]))));
  if constexpr (K < 3)
    store_value_pairs<K + 1>(x, d, pairs);
}

void tile_value_panels(const void *tile, int head_dim_v, bf16_t *panels, size_t ld_panel) noexcept {
  const uint8_t *bytes = static_cast<const uint8_t *>(tile);
  const int num_blocks = head_dim_v / QK4_0;
  for (int b = 0; b < num_blocks; ++b) {
    float d[kTileTokens];
    f16_to_f32(nibble_scale(bytes, num_blocks, b, 0), d, kTileTokens);
    for (int i = b * QK4_0; i < (b + 1) * QK4_0; i += kLanes) {
      bf16_t *column =
          panels + static_cast<size_t>(i / kPanelColumns) * ld_panel + i % kPanelColumns * 2;
      for (int g = 0; g < 2; ++g)
        store_value_pairs<0>(load_i32(bytes + (g * head_dim_v + i) * 4), d + g * 8,
                             column + g * 4 * 2 * kPanelColumns);
    }
  }
}
#endif

// --- the table -----------------------------------------------------------------------------------

constexpr TileKernels make_tiles_q4_0() {
  TileKernels k = any_tiles<Q4_0Tiles, Q4_0Keys, Q4_0Values>();
  k.values_to_f32 = tile_values_to_f32;
  k.keys_to_f32 = tile_keys_to_f32;
  k.pack_values_f32 = pack_nibbles<float, Q4_0Tiles>;
  k.pack_values_f16 = pack_nibbles<f16_t, Q4_0Tiles>;
#if defined(MIXEDKV_BF16)
  k.key_panel = tile_key_panel;
  k.value_panels = tile_value_panels;
#endif
  return k;
}
