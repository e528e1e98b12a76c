// Q8_0, value by value: by ggml's definition (kernels.h).

void quantize_q8_0(const float *x, block_q8_0 *y) {
  float largest = 0.0f; // magnitude
  bool finite = true;
  for (int i = 0; i < QK8_0; ++i) {
    finite = finite && is_finite(x[i]);
    const float magnitude = float_of(bits_of(x[i]) & 0x7fffffffu);
    if (magnitude > largest)
      largest = magnitude;
  }
  memset(y->qs, 0, sizeof y->qs);
  if (!finite) {
    y->d = 0x7e00u;
    return;
  }
  const float d = largest / 127.0f;
  y->d = float_to_half(d);
  const float id = d == 0.0f ? 0.0f : 1.0f / d;
  if (!is_finite(id))
    return;
  for (int i = 0; i < QK8_0; ++i) {
    const float scaled = x[i] * id;
    y->qs[i] = static_cast<int8_t>(roundf(scaled));
  }
}

template <> struct BlockMath<block_q8_0> {
  static void quantize(const float *x, block_q8_0 *y) { quantize_q8_0(x, y); }
  static float value(const block_q8_0 &block, int i) {
    return static_cast<float>(block.qs[i]) * half_to_float(block.d);
  }
};

template <> struct InTile<block_q8_0> : ByteInTile<block_q8_0> {};
