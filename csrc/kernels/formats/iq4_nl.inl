// IQ4_NL: values to rows, in the vocabulary of common.h.
//
// ggml's bytes follow from sums that run over the 32 values of a block one after the other. So a
// lane is a block here: as many blocks are transposed as a vector has lanes, and every step, the
// sums too, is made for all of them together in the order in which ggml makes it.

/// The sixteen levels, and what lies half way between them: from there on a value takes the level
/// above. (ggml compares the differences to both, which are exact there.)
constexpr int8_t kLevelsIq4Nl[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                     1,    13,   25,  38,  53,  69,  89,  113};
constexpr float middle_above(int level) {
  return 0.5f * static_cast<float>(kLevelsIq4Nl[level] + kLevelsIq4Nl[level + 1]);
}

/// Adds one value of every block, which becomes its level's number, to the sums.
MIXEDKV_INLINE void add_to_level_sums(f32v inverse, f32v &x, f32v &of_products, f32v &of_squares) {
  // A level and its number in one: number * 1024 + level.
  const f32v scaled = mul(inverse, x);
  f32v both = set1(kLevelsIq4Nl[0]);
  for (int i = 0; i < 15; ++i)
    both = select_below(scaled, set1(middle_above(i)), both,
                        set1(static_cast<float>((i + 1) * 1024 + kLevelsIq4Nl[i + 1])));
  const f32v number = rint(mul(both, set1(1.0f / 1024.0f)));
  const f32v level = fma(number, set1(-1024.0f), both);
  const f32v weighted = mul(mul(x, x), level);
  of_products = add(of_products, mul(weighted, x));
  of_squares = add(of_squares, mul(weighted, level));
  x = number;
}

/// count <= kLanes blocks: y[i] from the 32 values, f32 or f16, at source(i).
template <typename F> MIXEDKV_INLINE void quantize_blocks(F source, int count, block_iq4_nl *y) {
  f32v x[QK4_NL]; // a value of every block; lanes without a block repeat the last one's
  f32v part[kLanes];
  for (int first = 0; first < QK4_NL; first += kLanes) {
    for (int b = 0; b < kLanes; ++b)
      part[b] = load(source(b < count ? b : count - 1) + first);
    transpose(part);
    for (int i = 0; i < kLanes; ++i)
      x[first + i] = part[i];
  }

  f32v largest = zero(); // magnitude
  f32v max = zero();     // the first value that has it
  f32v top = zero();     // as largest, and NaN where a value is
  for (int i = 0; i < QK4_NL; ++i) {
    const f32v magnitude = abs_of(x[i]);
    max = select_below(largest, magnitude, x[i], max);
    largest = select_below(largest, magnitude, magnitude, largest);
    top = max_bits(top, magnitude);
  }
  const f32v inverse = div(set1(1.0f), div(max, set1(kLevelsIq4Nl[0])));
  f32v of_products = zero(), of_squares = zero();
  for (int i = 0; i < QK4_NL; ++i)
    add_to_level_sums(inverse, x[i], of_products, of_squares);
  const f32v smallest = set1(1e-15f);
  const f32v d = select_below(largest, smallest, zero(), div(of_products, of_squares));

  f16_t scales[kLanes];
  store(scales, d);
  for (int b = 0; b < count; ++b)
    y[b].d = scales[b];
  for (int first = 0; first < QK4_NL / 2; first += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      // A byte as a signed number; 0x88 where the block is taken for zeros.
      const f32v byte = fma(x[QK4_NL / 2 + first + i], set1(16.0f), x[first + i]);
      part[i] = select_below(byte, set1(128.0f), byte, sub(byte, set1(256.0f)));
      part[i] = select_below(largest, smallest, set1(-120.0f), part[i]);
    }
    transpose(part);
    for (int b = 0; b < count; ++b)
      store_bytes(reinterpret_cast<int8_t *>(y[b].qs + first), to_i32(part[b]));
  }
  if (any_not_finite(top) || any_not_finite(d)) {
    float tops[kLanes], ds[kLanes];
    store(tops, top);
    store(ds, d);
    for (int b = 0; b < count; ++b)
      if ((bits_of(tops[b]) & 0x7f800000u) == 0x7f800000u || ds[b] != ds[b]) {
        y[b].d = 0x7e00u;
        memset(y[b].qs, 0, sizeof y[b].qs);
      }
  }
}

template <> struct BlockWords<block_iq4_nl> {
  using Opened = Levels;
  static MIXEDKV_INLINE Levels open(const block_iq4_nl *block) {
    return open_levels(kLevelsIq4Nl, block->d, load_b16(block->qs));
  }
  template <int V> static MIXEDKV_INLINE f32v vector(const Levels &x) { return level<V>(x); }
  template <int V> static MIXEDKV_INLINE f32v exact(const Levels &x) { return level<V>(x); }
};

// --- the table ---------------------------------------------------------------------------------

constexpr RowKernels rows_iq4_nl() { return quantized_rows<block_iq4_nl>(); }
