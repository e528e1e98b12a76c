// NL3, value by value (kernels.h).

void quantize_nl3(const float *x, block_nl3 *y) {
  static const int multipliers[5] = {148, 137, 127, 119, 111};
  uint8_t numbers[QNL3];
  memset(y->qs, 0, sizeof y->qs);
  if (!search_levels(x, QNL3, kLevelsNl3, 8, 1.0f, multipliers, 5, &y->d, numbers)) {
    y->d = 0x7e00u;
    return;
  }
  for (int i = 0; i < QNL3; ++i)
    put_nl3_row_value(y->qs, i, numbers[i]);
}

template <> struct BlockMath<block_nl3> {
  static void quantize(const float *x, block_nl3 *y) { quantize_nl3(x, y); }
  static float value(const block_nl3 &block, int i) {
    return static_cast<float>(kLevelsNl3[nl3_row_value(block.qs, i)]) * half_to_float(block.d);
  }
};

template <> struct InTile<block_nl3> {
  static uint8_t *key_byte(const uint8_t *tile, int block, int i, int token) {
    return const_cast<uint8_t *>(tile) + ((block * 3 + i / 4) * kTileTokens + token) * 4 + i % 4;
  }
  static block_nl3 key(const uint8_t *tile, int num_blocks, int block, int token) {
    block_nl3 out;
    for (int i = 0; i < kNl3CodeBytes; ++i)
      out.qs[i] = *key_byte(tile, block, i, token);
    out.d = *tile_scale(tile, kNl3CodeBytes, num_blocks, block, token);
    return out;
  }
  static void put_key(uint8_t *tile, int num_blocks, int block, int token, const block_nl3 &from) {
    for (int i = 0; i < kNl3CodeBytes; ++i)
      *key_byte(tile, block, i, token) = from.qs[i];
    *tile_scale(tile, kNl3CodeBytes, num_blocks, block, token) = from.d;
  }
  static block_nl3 value(const uint8_t *tile, int num_blocks, int block, int token) {
    block_nl3 out;
    memset(out.qs, 0, sizeof out.qs);
    for (int i = 0; i < QNL3; ++i)
      put_nl3_row_value(out.qs, i, nl3_value(tile + block * kNl3BlockBytes, i, token));
    out.d = *tile_scale(tile, kNl3CodeBytes, num_blocks, block, token);
    return out;
  }
  static void put_value(uint8_t *tile, int num_blocks, int block, int token,
                        const block_nl3 &from) {
    for (int i = 0; i < QNL3; ++i)
      set_nl3_value(tile + block * kNl3BlockBytes, i, token, nl3_row_value(from.qs, i));
    *tile_scale(tile, kNl3CodeBytes, num_blocks, block, token) = from.d;
  }
};
