// Rows to packed Q4_0 (packed.h), a tile at a time: what a move to the cold tier spends its time
// on.
//
// Blocks are quantised one by one, as rows are, and meet in registers: for keys, four tokens' words
// change places with four words' tokens; for values, the nibbles of eight tokens are laid side by
// side in bytes, two by two, and the bytes zipped to words. Either is a fraction of what quantising
// takes. Token by token, as tiles were packed before, every value was a read and a write of
// a word for the sake of one nibble.

/// Quantises block b of the rows that there are; the others become blocks of bytes that pack to
/// zeros where they are values.
template <typename T>
MIXEDKV_INLINE void quantize_blocks(const void *const *rows, int b,
                                    block_q4_0 (&blocks)[kPackedTokens]) {
  const void *some = nullptr;
  bool all = true;
  for (int t = 0; t < kPackedTokens; ++t) {
    all &= rows[t] != nullptr;
    some = rows[t] ? rows[t] : some;
  }
  if (!some)
    return;
  for (int first = 0; first < kPackedTokens; first += kQuantBlocks) {
    const auto source = [=](int i) {
      const void *row = rows[first + i] ? rows[first + i] : some;
      return static_cast<const T *>(row) + b * QK4_0;
    };
    quantize_group<T>(source, blocks + first);
  }
  for (int t = 0; t < kPackedTokens && !all; ++t)
    if (!rows[t])
      memset(blocks[t].qs, 0x88, sizeof blocks[t].qs);
}

MIXEDKV_INLINE void pack_scales(const void *const *rows, const block_q4_0 (&blocks)[kPackedTokens],
                                f16_t *scales) {
  for (int t = 0; t < kPackedTokens; ++t)
    if (rows[t])
      scales[t] = blocks[t].d;
}

template <typename T> void pack_keys(const void *const *rows, int head_dim, void *tile) noexcept {
  uint8_t *bytes = static_cast<uint8_t *>(tile);
  const int num_blocks = head_dim / QK4_0;
  block_q4_0 blocks[kPackedTokens];
  for (int b = 0; b < num_blocks; ++b) {
    quantize_blocks<T>(rows, b, blocks);
    for (int t = 0; t < kPackedTokens; t += 4) {
      uint8_t *words = bytes + b * kPackedBlockBytes + t * 4;
      if (rows[t] && rows[t + 1] && rows[t + 2] && rows[t + 3]) {
        b16 x[4];
        for (int i = 0; i < 4; ++i)
          x[i] = load_b16(blocks[t + i].qs);
        transpose_words_b16(x);
        for (int w = 0; w < 4; ++w)
          store_b16(words + w * 4 * kPackedTokens, x[w]);
        continue;
      }
      for (int i = 0; i < 4; ++i)
        for (int w = 0; w < 4 && rows[t + i]; ++w)
          memcpy(words + i * 4 + w * 4 * kPackedTokens, blocks[t + i].qs + 4 * w, 4);
    }
    pack_scales(rows, blocks, packed_scale(bytes, num_blocks, b, 0));
  }
}

/// Sixteen words of values from the bytes that hold their nibbles; those in `keep` stay.
MIXEDKV_INLINE void pack_words(b16 (&x)[4], uint32_t keep, uint8_t *words) {
  interleave_b16(x);
  for (int i = 0; i < 4; ++i) {
    if (keep)
      x[i] = or_b16(x[i], and_b16(load_b16(words + 16 * i), set1_words_b16(keep)));
    store_b16(words + 16 * i, x[i]);
  }
}

template <typename T>
void pack_values(const void *const *rows, int head_dim_v, void *tile) noexcept {
  uint8_t *bytes = static_cast<uint8_t *>(tile);
  const int num_blocks = head_dim_v / QK4_0;
  uint32_t keep[2] = {0, 0};
  for (int t = 0; t < kPackedTokens; ++t)
    if (!rows[t])
      keep[t / 8] |= 15u << packed_value_shift(t);
  const b16 flip = set1_b16(0x88);
  block_q4_0 blocks[kPackedTokens];
  for (int b = 0; b < num_blocks; ++b) {
    quantize_blocks<T>(rows, b, blocks);
    for (int g = 0; g < 2; ++g) {
      if (keep[g] == 0xffffffffu)
        continue;
      // Nibbles 0 to 7 of a word: tokens 0, 2, 4, 6, then 1, 3, 5, 7.
      static constexpr int kFirst[4] = {0, 4, 1, 5};
      b16 low[4], high[4];
      for (int i = 0; i < 4; ++i) {
        const b16 a = xor_b16(load_b16(blocks[g * 8 + kFirst[i]].qs), flip);
        const b16 c = xor_b16(load_b16(blocks[g * 8 + kFirst[i] + 2].qs), flip);
        low[i] = low_nibbles_of(a, c);
        high[i] = high_nibbles_of(a, c);
      }
      uint8_t *words = bytes + (g * num_blocks + b) * QK4_0 * 4;
      pack_words(low, keep[g], words);
      pack_words(high, keep[g], words + QK4_0 / 2 * 4);
    }
    pack_scales(rows, blocks, packed_scale(bytes, num_blocks, b, 0));
  }
}
