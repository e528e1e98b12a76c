// IQ4_NL, value by value: by ggml's definition (kernels.h).

const int kLevelsIq4Nl[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                              1,    13,   25,  38,  53,  69,  89,  113};

/// The nearest level, the upper one of two as near.
int nearest_level(float x) {
  int best = 15;
  for (int i = 14; i >= 0; --i)
    if (x - static_cast<float>(kLevelsIq4Nl[i]) < static_cast<float>(kLevelsIq4Nl[i + 1]) - x)
      best = i;
  return best;
}

void quantize_iq4_nl(const float *x, block_iq4_nl *y) {
  float largest = 0.0f; // magnitude
  float max = 0.0f;     // the first value that has it
  bool finite = true;
  for (int i = 0; i < QK4_NL; ++i) {
    finite = finite && is_finite(x[i]);
    const float magnitude = float_of(bits_of(x[i]) & 0x7fffffffu);
    if (magnitude > largest) {
      largest = magnitude;
      max = x[i];
    }
  }
  float d = 0.0f;
  int q[QK4_NL];
  for (int i = 0; i < QK4_NL; ++i)
    q[i] = 8;
  if (finite && largest >= 1e-15f) {
    const float id = 1.0f / (max / static_cast<float>(kLevelsIq4Nl[0]));
    float of_products = 0.0f, of_squares = 0.0f;
    for (int i = 0; i < QK4_NL; ++i) {
      const float scaled = id * x[i];
      q[i] = nearest_level(scaled);
      const float level = static_cast<float>(kLevelsIq4Nl[q[i]]);
      const float weight = x[i] * x[i];
      const float weighted = weight * level;
      const float product = weighted * x[i];
      const float square = weighted * level;
      of_products += product;
      of_squares += square;
    }
    d = of_products / of_squares;
  }
  if (!finite || d != d) {
    y->d = 0x7e00u;
    memset(y->qs, 0, sizeof y->qs);
    return;
  }
  y->d = float_to_half(d);
  for (int i = 0; i < QK4_NL / 2; ++i)
    y->qs[i] = static_cast<uint8_t>(q[i] | q[i + QK4_NL / 2] << 4);
}

template <> struct BlockMath<block_iq4_nl> {
  static void quantize(const float *x, block_iq4_nl *y) { quantize_iq4_nl(x, y); }
  static float value(const block_iq4_nl &block, int i) {
    const int half = QK4_NL / 2;
    const int q = i < half ? block.qs[i] & 15 : block.qs[i - half] >> 4;
    return static_cast<float>(kLevelsIq4Nl[q]) * half_to_float(block.d);
  }
};

template <> struct InTile<block_iq4_nl> : NibbleInTile<block_iq4_nl, 0> {};
