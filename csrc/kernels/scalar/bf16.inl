// Arithmetic in bf16, value by value, for scalar.cpp: a number is rounded where the vector files
// round theirs, and kept in an f32 that has no more bits than that. (Products of two are exact in
// f32; what remains to differ is the order of sums.)

void bf16_round_row(const float *x, bf16_t *y, size_t n) noexcept {
  for (size_t i = 0; i < n + n % 2; ++i)
    y[i] = i < n ? float_to_bf16(x[i]) : bf16_t{0};
}

float bf16_exp_sum(const float *x, bf16_t *p, size_t n, float m) noexcept {
  float sum = 0.0f;
  for (size_t i = 0; i < (n + 31) / 32 * 32; ++i) {
    p[i] = bf16_t{0};
    if (i < n && !(x[i] - m < -87.33655f)) {
      p[i] = float_to_bf16(
          static_cast<float>(exp(static_cast<double>(x[i]) - static_cast<double>(m))));
      sum += bf16_to_float(p[i]);
    }
  }
  return sum;
}

/// Where number i of a column is in a panel.
size_t in_panel(int i, int column) {
  return static_cast<size_t>(i / 2 * 2 * kPanelColumns + column * 2 + i % 2);
}

template <typename T> float row_value(const Rows &rows, int j, int i);

template <typename T>
void bf16_key_panel(const Rows *k, int num_keys, int head_dim, bf16_t *panel) noexcept {
  for (int i = 0; i < head_dim + head_dim % 2; ++i)
    for (int j = 0; j < kPanelColumns; ++j)
      panel[in_panel(i, j)] =
          j < num_keys && i < head_dim ? float_to_bf16(row_value<T>(*k, j, i)) : bf16_t{0};
}

template <typename T>
void bf16_value_panels(const Rows *v, int num_keys, int head_dim_v, bf16_t *panels,
                       size_t ld_panel) noexcept {
  for (int j = 0; j < num_keys + num_keys % 2; ++j)
    for (int i = 0; i < (head_dim_v + kPanelColumns - 1) / kPanelColumns * kPanelColumns; ++i)
      panels[static_cast<size_t>(i / kPanelColumns) * ld_panel + in_panel(j, i % kPanelColumns)] =
          j < num_keys && i < head_dim_v ? float_to_bf16(row_value<T>(*v, j, i)) : bf16_t{0};
}

template <typename Block> float tile_key(const void *tile, int head_dim, int i, int token);
template <typename Block> float tile_value(const void *tile, int head_dim, int i, int token);

template <typename Block>
void bf16_tile_key_panel(const void *tile, int head_dim, bf16_t *panel) noexcept {
  for (int i = 0; i < head_dim; ++i)
    for (int j = 0; j < kPanelColumns; ++j)
      panel[in_panel(i, j)] = float_to_bf16(tile_key<Block>(tile, head_dim, i, j));
}

template <typename Block>
void bf16_tile_value_panels(const void *tile, int head_dim_v, bf16_t *panels,
                            size_t ld_panel) noexcept {
  for (int j = 0; j < kTileTokens; ++j)
    for (int i = 0; i < head_dim_v; ++i)
      panels[static_cast<size_t>(i / kPanelColumns) * ld_panel + in_panel(j, i % kPanelColumns)] =
          float_to_bf16(tile_value<Block>(tile, head_dim_v, i, j));
}

bool bf16_all_finite(const bf16_t *x, size_t n) noexcept {
  for (size_t i = 0; i < n; ++i)
    if (!is_finite(bf16_to_float(x[i])))
      return false;
  return true;
}

void bf16_product(const bf16_t *a, size_t ld_a, int num_rows, const bf16_t *panels, size_t ld_panel,
                  int num_pairs, int num_columns, bool add, float *c, size_t ld_c) noexcept {
  for (int r = 0; r < num_rows; ++r)
    for (int j = 0; j < num_columns; ++j) {
      const bf16_t *panel = panels + static_cast<size_t>(j / kPanelColumns) * ld_panel;
      float *out = c + static_cast<size_t>(r) * ld_c + static_cast<size_t>(j);
      float sum = 0.0f;
      for (int i = 0; i < 2 * num_pairs; ++i)
        sum += bf16_to_float(a[static_cast<size_t>(r) * ld_a + static_cast<size_t>(i)]) *
               bf16_to_float(panel[in_panel(i, j % kPanelColumns)]);
      *out = add ? *out + sum : sum;
    }
}

const Bf16Kernels bf16_kernels = {bf16_round_row, bf16_exp_sum, bf16_all_finite, bf16_product};
