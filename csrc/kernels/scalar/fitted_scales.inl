// Scales of Q4_0 and IQ4_NL by least squared error, value by value (kernels.h).

template <typename Block> float squared_error(const float *x, const Block &block) {
  float sum = 0.0f;
  for (int i = 0; i < 32; ++i) {
    const int j = i / 2 + i % 2 * 16; // both values of a byte, byte after byte
    const float error = x[j] - BlockMath<Block>::value(block, j);
    const float square = error * error;
    sum += square;
  }
  return sum;
}

/// levels: `unit` of them to a step of the format's own codes.
template <typename Block>
void fit_block(const float *x, const int8_t *levels, float unit, Block *y) {
  static const int multipliers[9] = {151, 143, 137, 130, 125, 120, 115, 111, 107};
  BlockMath<Block>::quantize(x, y);
  const float own_error = squared_error(x, *y);
  Block found;
  uint8_t numbers[32];
  if (!is_finite(own_error) || own_error < kFitLeastError ||
      !search_levels(x, 32, levels, 16, unit, multipliers, 9, &found.d, numbers))
    return;
  for (int i = 0; i < 16; ++i)
    found.qs[i] = static_cast<uint8_t>(numbers[i] | numbers[i + 16] << 4);
  const float least_wanted = squared_error(x, found) * kFitMargin;
  if (least_wanted < own_error)
    *y = found;
}

template <typename Block> struct FittedMath;
template <> struct FittedMath<block_q4_0> {
  static void quantize(const float *x, block_q4_0 *y) { fit_block(x, kLevelsQ4_0, 16.0f, y); }
};
template <> struct FittedMath<block_iq4_nl> {
  static void quantize(const float *x, block_iq4_nl *y) {
    int8_t levels[16];
    for (int i = 0; i < 16; ++i)
      levels[i] = static_cast<int8_t>(kLevelsIq4Nl[i]);
    fit_block(x, levels, 1.0f, y);
  }
};

template <typename Block> constexpr RowKernels fitted_rows() {
  RowKernels k = block_rows<Block>();
  k.fit_f32 = from_f32<Block, FittedMath<Block>>;
  k.fit_f16 = from_f16<Block, FittedMath<Block>>;
  return k;
}

template <typename Block> constexpr TileKernels fitted_tiles() {
  TileKernels k = tiles_of<Block>();
  k.fit_keys_f32 = pack<Block, float, true, FittedMath<Block>>;
  k.fit_keys_f16 = pack<Block, f16_t, true, FittedMath<Block>>;
  k.fit_values_f32 = pack<Block, float, false, FittedMath<Block>>;
  k.fit_values_f16 = pack<Block, f16_t, false, FittedMath<Block>>;
  return k;
}
