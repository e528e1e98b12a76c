// Q8_0: values to rows, in the vocabulary of common.h.
//
// As many blocks are taken at a time as a vector has lanes: each is folded to one vector of largest
// magnitudes, and these are transposed, so that a lane holds what there is one of in a block, and
// the two divisions are made for all of them together.

/// To the nearest integer, halves away from zero; |x| < 2^22.
MIXEDKV_INLINE f32v round_half_away(f32v x) {
  const f32v magnitude = abs_of(x);
  const f32v nearest = rint(magnitude); // halves to even
  const f32v rest = sub(magnitude, nearest);
  return copy_sign(select_below(rest, set1(0.5f), nearest, add(nearest, set1(1.0f))), x);
}

/// count <= kLanes blocks: y[i] from the 32 values, f32 or f16, at source(i).
template <typename F> MIXEDKV_INLINE void quantize_blocks(F source, int count, block_q8_0 *y) {
  f32v largest[kLanes];
  for (int b = 0; b < kLanes; ++b) { // lanes without a block repeat the last one's
    const auto *x = source(b < count ? b : count - 1);
    largest[b] = abs_of(load(x));
    for (int i = kLanes; i < QK8_0; i += kLanes)
      largest[b] = max_bits(largest[b], abs_of(load(x + i)));
  }
  transpose(largest);
  f32v magnitude = largest[0];
  for (int i = 1; i < kLanes; ++i)
    magnitude = max_bits(magnitude, largest[i]);

  const f32v d = div(magnitude, set1(127.0f));
  const f32v id = div(set1(1.0f), d);
  f16_t scales[kLanes];
  float inverses[kLanes];
  store(scales, d);
  // Not finite where d is zero, or too small to have an inverse, or where a value is not finite.
  store(inverses, select_below(id, set1(INFINITY), id, zero()));
  for (int b = 0; b < count; ++b) {
    const auto *x = source(b);
    y[b].d = scales[b];
    for (int i = 0; i < QK8_0; i += kLanes)
      store_bytes(y[b].qs + i, to_i32(round_half_away(mul(load(x + i), set1(inverses[b])))));
  }
  if (any_not_finite(magnitude)) {
    float magnitudes[kLanes];
    store(magnitudes, magnitude);
    for (int b = 0; b < count; ++b)
      if ((bits_of(magnitudes[b]) & 0x7f800000u) == 0x7f800000u) {
        y[b].d = 0x7e00u;
        memset(y[b].qs, 0, sizeof y[b].qs);
      }
  }
}

template <> struct BlockWords<block_q8_0> {
  struct Opened {
    const int8_t *qs;
    f32v d;
  };
  static MIXEDKV_INLINE Opened open(const block_q8_0 *block) {
    return {block->qs, set1_half(block->d)};
  }
  template <int V> static MIXEDKV_INLINE f32v exact(const Opened &q8) {
    return mul(load(q8.qs + V * kLanes), q8.d);
  }
  template <int V> static MIXEDKV_INLINE f32v vector(const Opened &q8) { return exact<V>(q8); }
};

// --- the table ---------------------------------------------------------------------------------

constexpr RowKernels rows_q8_0() { return quantized_rows<block_q8_0>(); }
