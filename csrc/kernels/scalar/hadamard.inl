// The normalised Walsh-Hadamard transform, a pair at a time.

void hadamard(float *x, size_t n, size_t block) noexcept {
  const float factor = static_cast<float>(1.0 / sqrt(static_cast<double>(block)));
  for (size_t begin = 0; begin < n; begin += block) {
    float *row = x + begin;
    for (size_t i = 0; i < block; ++i)
      row[i] *= factor;
    for (size_t apart = 1; apart < block; apart *= 2)
      for (size_t pair = 0; pair < block / 2; ++pair) {
        const size_t low = pair / apart * 2 * apart + pair % apart;
        const float sum = row[low] + row[low + apart];
        const float difference = row[low] - row[low + apart];
        row[low] = sum;
        row[low + apart] = difference;
      }
  }
}
