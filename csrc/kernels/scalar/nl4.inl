// NL4, value by value (kernels.h).

void quantize_nl4(const float *x, block_nl4 *y) {
  static const int multipliers[9] = {159, 149, 141, 134, 127, 121, 115, 110, 106};
  uint8_t numbers[QNL4];
  if (!search_levels(x, QNL4, kLevelsNl4, 16, 1.0f, multipliers, 9, &y->d, numbers)) {
    y->d = 0x7e00u;
    memset(y->qs, 0, sizeof y->qs);
    return;
  }
  for (int part = 0; part < 2; ++part)
    for (int j = 0; j < 16; ++j)
      y->qs[part * 16 + j] =
          static_cast<uint8_t>(numbers[part * 32 + j] | numbers[part * 32 + j + 16] << 4);
}

template <> struct BlockMath<block_nl4> {
  static void quantize(const float *x, block_nl4 *y) { quantize_nl4(x, y); }
  static float value(const block_nl4 &block, int i) {
    const int byte = block.qs[i / 32 * 16 + i % 16];
    const int q = i % 32 < 16 ? byte & 15 : byte >> 4;
    return static_cast<float>(kLevelsNl4[q]) * half_to_float(block.d);
  }
};

template <> struct InTile<block_nl4> : NibbleInTile<block_nl4, 0> {};
