// Row kernels of plain formats and of blocks, from the loops that are written once.

template <typename T> void row_to_f32(const void *x, float *y, size_t n) noexcept {
  const T *blocks = static_cast<const T *>(x);
  for (int b = 0; b < static_cast<int>(n / kBlockValues); ++b)
    store_block<T, true>(open_part(blocks, b), y + static_cast<size_t>(b) * kBlockValues);
}
template <typename T> void row_to_f16(const void *x, f16_t *y, size_t n) noexcept {
  const T *blocks = static_cast<const T *>(x);
  for (int b = 0; b < static_cast<int>(n / kBlockValues); ++b)
    store_block<T, true>(open_part(blocks, b), y + static_cast<size_t>(b) * kBlockValues);
}

/// What attention needs of rows of T.
template <typename T> constexpr RowKernels attention_rows() {
  RowKernels k{};
  k.qk = qk_rows_of<T>;
  k.pv = pv_rows_of<T>;
  k.transpose_keys = transpose_keys<T>;
#if defined(MIXEDKV_BF16)
  k.key_panel = bf16_key_panel<T>;
  k.value_panels = bf16_value_panels<T>;
#endif
  return k;
}

/// Everything but from_f32 and from_f16.
template <typename T> constexpr RowKernels block_rows() {
  RowKernels k = attention_rows<T>();
  k.to_f32 = row_to_f32<T>;
  k.to_f16 = row_to_f16<T>;
  return k;
}

/// Rows from values by quantize_blocks, which a format of blocks may have.
template <typename T, typename B> void row_from(const T *x, void *y, size_t n) noexcept {
  B *blocks = static_cast<B *>(y);
  constexpr int kValues = kBlockValues * kParts<B>;
  const size_t num_blocks = n / kValues;
  for (size_t b = 0; b < num_blocks; b += kLanes) {
    const T *part = x + b * kValues;
    const size_t rest = num_blocks - b;
    quantize_blocks([part](int i) { return part + i * kValues; },
                    rest < kLanes ? static_cast<int>(rest) : kLanes, blocks + b);
  }
}

template <typename B> constexpr RowKernels quantized_rows() {
  RowKernels k = block_rows<B>();
  k.from_f32 = row_from<float, B>;
  k.from_f16 = row_from<f16_t, B>;
  return k;
}

// --- f32, f16, bf16
// -----------------------------------------------------------------------------------

void f32_from_f32(const float *x, void *y, size_t n) noexcept { memcpy(y, x, n * sizeof(float)); }
void f32_from_f16(const f16_t *x, void *y, size_t n) noexcept {
  f16_to_f32(x, static_cast<float *>(y), n);
}
void f32_to_f32(const void *x, float *y, size_t n) noexcept { memcpy(y, x, n * sizeof(float)); }
void f32_row_to_f16(const void *x, f16_t *y, size_t n) noexcept {
  f32_to_f16(static_cast<const float *>(x), y, n);
}

constexpr RowKernels rows_f32() {
  RowKernels k = attention_rows<float>();
  k.from_f32 = f32_from_f32;
  k.from_f16 = f32_from_f16;
  k.to_f32 = f32_to_f32;
  k.to_f16 = f32_row_to_f16;
  return k;
}

void f16_from_f32(const float *x, void *y, size_t n) noexcept {
  f32_to_f16(x, static_cast<f16_t *>(y), n);
}
void f16_from_f16(const f16_t *x, void *y, size_t n) noexcept { memcpy(y, x, n * sizeof(f16_t)); }
void f16_row_to_f32(const void *x, float *y, size_t n) noexcept {
  f16_to_f32(static_cast<const f16_t *>(x), y, n);
}
void f16_to_f16(const void *x, f16_t *y, size_t n) noexcept { memcpy(y, x, n * sizeof(f16_t)); }

constexpr RowKernels rows_f16() {
  RowKernels k = attention_rows<f16_t>();
  k.from_f32 = f16_from_f32;
  k.from_f16 = f16_from_f16;
  k.to_f32 = f16_row_to_f32;
  k.to_f16 = f16_to_f16;
  return k;
}

constexpr RowKernels rows_bf16() {
  RowKernels k = attention_rows<bf16_t>();
  k.from_f32 = row_to_bf16<float>;
  k.from_f16 = row_to_bf16<f16_t>;
  k.to_f32 = bf16_row_to<float>;
  k.to_f16 = bf16_row_to<f16_t>;
  return k;
}
