// Q4_0: values to rows, in the vocabulary of common.h.
//
// The value of largest magnitude with its sign comes from two integer maxima over the bits of the
// floats: the largest signed integer is the largest positive value, the largest unsigned one is the
// negative value of largest magnitude, and both order infinities and NaNs above all numbers, so
// that one comparison finds these. Only where a positive and a negative value share the largest
// magnitude does the first of them have to be searched for, one by one; in real data that is rare.
// Blocks are taken eight or sixteen at a time: what there is one of in a block, the scale and its
// inverse, is then computed for several blocks at once, and without a branch on the sign of the
// largest value, which is as good as random (and whose cost hides where few rows are quantised over
// and over). Tried and rejected: a running maximum of magnitudes beside the values they came from
// (two dependent blends a step, and ties between lanes need indices on top).

MIXEDKV_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

MIXEDKV_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

/// Of the first of 32 values whose magnitude has these bits, the sign.
inline uint32_t first_sign(const f32v *x, uint32_t magnitude) noexcept {
  float values[QK4_0];
  for (int i = 0; i < QK4_0 / kLanes; ++i)
    store(values + i * kLanes, x[i]);
  int i = 0;
  while ((bits_of(values[i]) & 0x7fffffffu) != magnitude)
    ++i;
  return bits_of(values[i]) & 0x80000000u;
}

/// One block, whatever is in it.
template <typename T> void quantize_block(const T *source, block_q4_0 *y) noexcept {
  f32v x[kVectors];
  for (int i = 0; i < kVectors; ++i)
    x[i] = load(source + i * kLanes);

  int32_t largest_signed;
  uint32_t largest_unsigned;
  find_extremes(x, largest_signed, largest_unsigned);
  const uint32_t positive = largest_signed > 0 ? static_cast<uint32_t>(largest_signed) : 0u;
  const uint32_t is_negative = 0u - (largest_unsigned >> 31); // all bits or none
  const uint32_t negative = largest_unsigned & 0x7fffffffu & is_negative;
  const uint32_t magnitude = positive > negative ? positive : negative;
  if (magnitude >= 0x7f800000u) {
    y->d = 0x7e00u;
    memset(y->qs, 0, sizeof y->qs);
    return;
  }
  uint32_t sign = positive > negative ? 0u : 0x80000000u;
  if (positive == negative) // of zeros of either sign, ggml takes the largest to be +0
    sign = magnitude ? first_sign(x, magnitude) : 0u;

  const float d = float_of(sign | magnitude) / -8.0f;
  float id = 1.0f / d;
  if ((bits_of(id) & 0x7f800000u) == 0x7f800000u) // d is zero, or too small to have an inverse
    id = 0.0f;
  y->d = to_half(d);
  // Two roundings, product and sum: an FMA here would give other bytes.
  for (int i = 0; i < kVectors; ++i)
    x[i] = add(mul(x[i], set1(id)), set1(8.5f));
  store_q4(y->qs, x);
}

/// kQuantBlocks blocks: y[i] from the 32 values of type T at source(i).
template <typename T, typename F> MIXEDKV_INLINE void quantize_group(F source, block_q4_0 *y) {
  constexpr int kGroups = kQuantBlocks / kLanes;
  f32v top[kGroups], bottom[kGroups];
  find_group_extremes<T>(source, top, bottom);
  f16_t scales[kQuantBlocks];
  float inverses[kQuantBlocks], odd[kQuantBlocks];
  bool any_odd = false;
  for (int g = 0; g < kGroups; ++g) {
    // Of a sign that no value has, the extreme is 0.
    const f32v positive = max_or_second(top[g], zero());
    const f32v negative = min_or_second(bottom[g], zero());
    const f32v depth = abs_of(negative);
    const f32v d = mul(select_below(positive, depth, negative, positive), set1(-0.125f));
    const f32v id = div(set1(1.0f), d);
    store(scales + g * kLanes, d);
    // Not finite where d is zero, or too small to have an inverse.
    store(inverses + g * kLanes, select_below(abs_of(id), set1(INFINITY), id, zero()));
    // Not finite where a value isn't, and where the largest magnitude has either sign.
    f32v is_odd = select_below(zero(), positive, set1(INFINITY), zero());
    is_odd = select_below(positive, depth, zero(), is_odd);
    is_odd = select_below(depth, positive, zero(), is_odd);
    is_odd = add(is_odd, add(abs_of(top[g]), abs_of(bottom[g])));
    store(odd + g * kLanes, is_odd);
    any_odd |= any_not_finite(is_odd);
  }
  for (int b = 0; b < kQuantBlocks; ++b) {
    f32v x[kVectors];
    // Two roundings, product and sum: an FMA here would give other bytes.
    for (int i = 0; i < kVectors; ++i)
      x[i] = add(mul(load(source(b) + i * kLanes), set1(inverses[b])), set1(8.5f));
    y[b].d = scales[b];
    store_q4(y[b].qs, x);
  }
  if (any_odd)
    for (int b = 0; b < kQuantBlocks; ++b)
      if ((bits_of(odd[b]) & 0x7f800000u) == 0x7f800000u)
        quantize_block(source(b), y + b);
}

template <typename T> MIXEDKV_INLINE void quantize_row(const T *x, block_q4_0 *y, size_t n) {
  const size_t num_blocks = n / QK4_0;
  size_t b = 0;
  for (; b + kQuantBlocks <= num_blocks; b += kQuantBlocks) {
    const T *group = x + b * QK4_0;
    quantize_group<T>([group](int i) { return group + i * QK4_0; }, y + b);
  }
  for (; b < num_blocks; ++b)
    quantize_block(x + b * QK4_0, y + b);
}

template <> struct BlockWords<block_q4_0> {
  using Opened = Q4;
  static MIXEDKV_INLINE Q4 open(const block_q4_0 *block) { return q4_open(block); }
  template <int V> static MIXEDKV_INLINE f32v vector(const Q4 &q4) { return q4_vector<V>(q4); }
  template <int V> static MIXEDKV_INLINE f32v exact(const Q4 &q4) { return q4_vector_exact<V>(q4); }
};

// --- the table ---------------------------------------------------------------------------------

void q4_0_from_f32(const float *x, void *y, size_t n) noexcept {
  quantize_row(x, static_cast<block_q4_0 *>(y), n);
}
void q4_0_from_f16(const f16_t *x, void *y, size_t n) noexcept {
  quantize_row(x, static_cast<block_q4_0 *>(y), n);
}

constexpr RowKernels rows_q4_0() {
  RowKernels k = block_rows<block_q4_0>();
  k.from_f32 = q4_0_from_f32;
  k.from_f16 = q4_0_from_f16;
  return k;
}
