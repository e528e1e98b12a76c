// The scale of a block of levels by least squared error, value by value (kernels.h).

/// One candidate's numbers of levels, and their sums.
struct LevelSums {
  uint8_t numbers[64] = {};
  int32_t products = 0, squares = 0;
};

LevelSums sums_of_levels(const int *x, int n, int m, const int8_t *levels, int num_levels) {
  LevelSums sums;
  for (int i = 0; i < n; ++i) {
    const int product = x[i] * m + 16384;
    const int y = product / 32768 - (product % 32768 < 0); // rounded down
    const int byte = y < -128 ? -128 : y > 127 ? 127 : y;
    int best = 0;
    for (int j = 1; j < num_levels; ++j)
      if (abs(byte - levels[j]) < abs(byte - levels[best]))
        best = j;
    sums.numbers[i] = static_cast<uint8_t>(best);
    sums.products += x[i] * levels[best];
    sums.squares += levels[best] * levels[best];
  }
  return sums;
}

/// False where a value is not finite. unit: what a step of levels stands for.
bool search_levels(const float *x, int n, const int8_t *levels, int num_levels, float unit,
                   const int *multipliers, int num_multipliers, f16_t *d, uint8_t *numbers) {
  float largest = 0.0f;
  for (int i = 0; i < n; ++i) {
    if (!is_finite(x[i]))
      return false;
    if (fabsf(x[i]) > largest)
      largest = fabsf(x[i]);
  }
  const float inverse = largest < 1e-30f ? 0.0f : 32767.0f / largest;
  int scaled[64];
  for (int i = 0; i < n; ++i)
    scaled[i] = static_cast<int>(nearbyintf(x[i] * inverse));
  LevelSums best;
  float best_score = -1.0f;
  for (int j = 0; j < 2 * num_multipliers; ++j) {
    const int m = j % 2 ? -multipliers[j / 2] : multipliers[j / 2];
    const LevelSums sums = sums_of_levels(scaled, n, m, levels, num_levels);
    const float products = static_cast<float>(sums.products);
    const float squared = products * products;
    const float score = squared / static_cast<float>(sums.squares);
    if (score > best_score) {
      best_score = score;
      best = sums;
    }
  }
  if (best_score < 0.0f) // every candidate's levels are zeros
    best = sums_of_levels(scaled, n, 0, levels, num_levels);
  const float divisor = best.squares > 1 ? static_cast<float>(best.squares) : 1.0f;
  const float ratio = static_cast<float>(best.products) / divisor;
  const float step = largest / 32767.0f;
  const float scale = step * unit;
  *d = float_to_half(ratio * scale);
  memcpy(numbers, best.numbers, static_cast<size_t>(n));
  return true;
}
