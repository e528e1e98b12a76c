// Q4_0, value by value: by ggml's definition (kernels.h).

void quantize_q4_0(const float *x, block_q4_0 *y) {
  float largest = 0.0f; // magnitude
  float max = 0.0f;     // the first value that has it; a block of zeros of any sign gives +0
  for (int i = 0; i < QK4_0; ++i) {
    if (!is_finite(x[i])) {
      y->d = 0x7e00u;
      memset(y->qs, 0, sizeof y->qs);
      return;
    }
    const float magnitude = float_of(bits_of(x[i]) & 0x7fffffffu);
    if (magnitude > largest) {
      largest = magnitude;
      max = x[i];
    }
  }
  const float d = max / -8.0f;
  float id = d == 0.0f ? 0.0f : 1.0f / d;
  if (!is_finite(id))
    id = 0.0f;
  y->d = float_to_half(d);
  for (int i = 0; i < QK4_0 / 2; ++i) {
    const float low_product = x[i] * id;
    const float high_product = x[i + QK4_0 / 2] * id;
    const int low = static_cast<int>(low_product + 8.5f);
    const int high = static_cast<int>(high_product + 8.5f);
    y->qs[i] = static_cast<uint8_t>((low < 15 ? low : 15) | (high < 15 ? high : 15) << 4);
  }
}

float value_q4_0(const block_q4_0 &block, int i) {
  const int half = QK4_0 / 2;
  const int q = i < half ? block.qs[i] & 15 : block.qs[i - half] >> 4;
  return static_cast<float>(q - 8) * half_to_float(block.d);
}

template <> struct BlockMath<block_q4_0> {
  static void quantize(const float *x, block_q4_0 *y) { quantize_q4_0(x, y); }
  static float value(const block_q4_0 &block, int i) { return value_q4_0(block, i); }
};

template <> struct InTile<block_q4_0> : NibbleInTile<block_q4_0, 0x8> {};
