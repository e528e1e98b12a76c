// Rows to token tiles, a tile at a time: what a move to the cold tier spends its time on.
//
// Blocks are quantised one by one, as rows are, and meet in registers: for keys, four tokens' words
// change places with four words' tokens; for values, the codes of a word's tokens are laid side by
// side in bytes (nibbles two by two) and the bytes zipped to words. Either is a fraction of what
// quantising takes. Token by token, as tiles were packed before, every value was a read and a write
// of a word for the sake of one nibble.
//
// A format says in a struct F:
//
//   Block                    as in rows
//   quantize<T>(source, y)   kTileTokens blocks, y[i] from 32 values T at source(i)
//   kFlipKeys, kFlipValues   what bytes of codes are changed by in tiles

/// Values of F's block.
template <typename F> constexpr int kPackedValues = kTileBlock *kParts<typename F::Block>;

/// Block b of the rows that there are; the others become blocks of codes that pack to zeros where
/// they are values.
template <typename T, typename F>
MIXEDKV_INLINE void tile_blocks(const void *const *rows, int b,
                                typename F::Block (&blocks)[kTileTokens]) {
  const void *some = nullptr;
  bool all = true;
  for (int t = 0; t < kTileTokens; ++t) {
    all &= rows[t] != nullptr;
    some = rows[t] ? rows[t] : some;
  }
  if (!some)
    return;
  F::template quantize<T>(
      [=](int i) {
        return static_cast<const T *>(rows[i] ? rows[i] : some) + b * kPackedValues<F>;
      },
      blocks);
  for (int t = 0; t < kTileTokens && !all; ++t)
    if (!rows[t])
      memset(blocks[t].qs, F::kFlipValues, sizeof blocks[t].qs);
}

template <typename Block>
MIXEDKV_INLINE void pack_scales(const void *const *rows, const Block (&blocks)[kTileTokens],
                                f16_t *scales) {
  for (int t = 0; t < kTileTokens; ++t)
    if (rows[t])
      scales[t] = blocks[t].d;
}

template <typename T, typename F>
void pack_keys(const void *const *rows, int head_dim, void *tile) noexcept {
  using Block = typename F::Block;
  constexpr int kCodeBytes = static_cast<int>(sizeof(Block::qs));
  uint8_t *bytes = static_cast<uint8_t *>(tile);
  const int num_blocks = head_dim / kPackedValues<F>;
  Block blocks[kTileTokens];
  for (int b = 0; b < num_blocks; ++b) {
    tile_blocks<T, F>(rows, b, blocks);
    for (int t = 0; t < kTileTokens; t += 4)
      for (int half = 0; half < kCodeBytes; half += 16) {
        uint8_t *words = bytes + (b * kCodeBytes + half) * kTileTokens + t * 4;
        b16 x[4];
        for (int i = 0; i < 4; ++i)
          x[i] = xor_b16(load_b16(reinterpret_cast<const uint8_t *>(blocks[t + i].qs) + half),
                         set1_b16(F::kFlipKeys));
        if (rows[t] && rows[t + 1] && rows[t + 2] && rows[t + 3]) {
          transpose_words_b16(x);
          for (int w = 0; w < 4; ++w)
            store_b16(words + w * 4 * kTileTokens, x[w]);
          continue;
        }
        for (int i = 0; i < 4; ++i) {
          uint8_t codes[16];
          store_b16(codes, x[i]);
          for (int w = 0; w < 4 && rows[t + i]; ++w)
            memcpy(words + i * 4 + w * 4 * kTileTokens, codes + 4 * w, 4);
        }
      }
    pack_scales(rows, blocks, tile_scale(bytes, kCodeBytes, num_blocks, b, 0));
  }
}

/// Sixteen words of values from the bytes that hold their codes; those in `keep` stay.
MIXEDKV_INLINE void pack_words(b16 (&x)[4], uint32_t keep, uint8_t *words) {
  interleave_b16(x);
  for (int i = 0; i < 4; ++i) {
    if (keep)
      x[i] = or_b16(x[i], and_b16(load_b16(words + 16 * i), set1_words_b16(keep)));
    store_b16(words + 16 * i, x[i]);
  }
}

/// Values of formats whose codes are nibbles.
template <typename T, typename F>
void pack_nibbles(const void *const *rows, int head_dim_v, void *tile) noexcept {
  uint8_t *bytes = static_cast<uint8_t *>(tile);
  constexpr int kOfBlock = kParts<typename F::Block>;
  const int num_blocks = head_dim_v / kTileBlock;
  uint32_t keep[2] = {0, 0};
  for (int t = 0; t < kTileTokens; ++t)
    if (!rows[t])
      keep[t / 8] |= 15u << nibble_shift(t);
  const b16 flip = set1_b16(F::kFlipValues);
  typename F::Block blocks[kTileTokens];
  for (int b = 0; b < num_blocks; ++b) {
    const int part = b % kOfBlock;
    if (part == 0)
      tile_blocks<T, F>(rows, b / kOfBlock, blocks);
    for (int g = 0; g < 2; ++g) {
      if (keep[g] == 0xffffffffu)
        continue;
      // Nibbles 0 to 7 of a word: tokens 0, 2, 4, 6, then 1, 3, 5, 7.
      static constexpr int kFirst[4] = {0, 4, 1, 5};
      b16 low[4], high[4];
      for (int i = 0; i < 4; ++i) {
        const b16 a =
            xor_b16(load_b16(blocks[g * 8 + kFirst[i]].qs + part * kNibbleCodeBytes), flip);
        const b16 c =
            xor_b16(load_b16(blocks[g * 8 + kFirst[i] + 2].qs + part * kNibbleCodeBytes), flip);
        low[i] = low_nibbles_of(a, c);
        high[i] = high_nibbles_of(a, c);
      }
      uint8_t *words = bytes + (g * num_blocks + b) * kTileBlock * 4;
      pack_words(low, keep[g], words);
      pack_words(high, keep[g], words + kTileBlock / 2 * 4);
    }
    if (part == 0)
      pack_scales(
          rows, blocks,
          tile_scale(bytes, kOfBlock * kNibbleCodeBytes, num_blocks / kOfBlock, b / kOfBlock, 0));
  }
}

/// Values of formats whose codes are bytes.
template <typename T, typename F>
void pack_bytes(const void *const *rows, int head_dim_v, void *tile) noexcept {
  uint8_t *bytes = static_cast<uint8_t *>(tile);
  const int num_blocks = head_dim_v / kTileBlock;
  uint32_t keep[4] = {0, 0, 0, 0};
  for (int t = 0; t < kTileTokens; ++t)
    if (!rows[t])
      keep[t / 4] |= 255u << 8 * byte_of_token(t);
  const b16 flip = set1_b16(F::kFlipValues);
  typename F::Block blocks[kTileTokens];
  for (int b = 0; b < num_blocks; ++b) {
    tile_blocks<T, F>(rows, b, blocks);
    for (int g = 0; g < 4; ++g) {
      if (keep[g] == 0xffffffffu)
        continue;
      for (int half = 0; half < kByteCodeBytes; half += 16) {
        b16 x[4];
        for (int t = 0; t < 4; ++t)
          x[byte_of_token(t)] = xor_b16(load_b16(blocks[g * 4 + t].qs + half), flip);
        pack_words(x, keep[g], bytes + ((g * num_blocks + b) * kTileBlock + half) * 4);
      }
    }
    pack_scales(rows, blocks, tile_scale(bytes, kByteCodeBytes, num_blocks, b, 0));
  }
}

// --- the table -----------------------------------------------------------------------------------

/// All but pack_values, which depends on what a word of values holds.
template <typename F, typename K, typename V> constexpr TileKernels any_tiles() {
  TileKernels k{};
  k.prepare_query = prepare_tile_query<K>;
  k.qk = qk_tiles<K>;
  k.pv = pv_tiles<V>;
  k.values_to_f32 = any_values_to_f32<V>;
  k.keys_to_f32 = any_keys_to_f32<K>;
  k.pack_keys_f32 = pack_keys<float, F>;
  k.pack_keys_f16 = pack_keys<f16_t, F>;
#if defined(MIXEDKV_BF16)
  k.key_panel = any_key_panel<K>;
  k.value_panels = any_value_panels<V>;
#endif
  return k;
}
