// One row of scores, through double.

float row_max(const float *x, size_t n) noexcept {
  float max = -INFINITY;
  for (size_t i = 0; i < n; ++i)
    if (x[i] > max)
      max = x[i];
  return max;
}

float exp_sum(float *x, size_t n, float m) noexcept {
  float sum = 0.0f;
  for (size_t i = 0; i < n; ++i) {
    x[i] = x[i] - m < -87.33655f
               ? 0.0f
               : static_cast<float>(exp(static_cast<double>(x[i]) - static_cast<double>(m)));
    sum += x[i];
  }
  return sum;
}

void soft_cap(float *x, size_t n, float cap) noexcept {
  for (size_t i = 0; i < n; ++i)
    x[i] = static_cast<float>(cap * tanh(static_cast<double>(x[i]) / cap));
}

void scale(float *x, size_t n, float f) noexcept {
  for (size_t i = 0; i < n; ++i)
    x[i] *= f;
}

void add_constants(const float *c, size_t ld_c, int num_rows, float *x, size_t ld_x,
                   int n) noexcept {
  for (int r = 0; r < num_rows; ++r)
    for (int j = 0; j < n; ++j)
      x[static_cast<size_t>(r) * ld_x + static_cast<size_t>(j)] += c[static_cast<size_t>(r) * ld_c];
}

void axpy(float f, const float *x, float *y, size_t n) noexcept {
  for (size_t i = 0; i < n; ++i)
    y[i] += f * x[i];
}
