// Scales of Q4_0 and IQ4_NL by least squared error, in the vocabulary of common.h: still ggml's
// bytes, but not those that ggml would have chosen.
//
// Blocks are quantised as ggml does it first, fast. Then scales are searched for as nl4's and nl3's
// are (loops/level_search.inl), and what is found takes a block's place where it is nearer to the
// values. Both errors are added up in the same order on every instruction set, a lane a block.

struct FitQ4_0 {
  using Block = block_q4_0;
  static constexpr int kValues = QK4_0;
  static constexpr int kWords = 4;
  static constexpr LevelTable kTable{kLevelsQ4_0, 16};
  static constexpr float kLevelsPerUnit = 16.0f;
  static constexpr uint8_t kMultipliers[9] = {151, 143, 137, 130, 125, 120, 115, 111, 107};
  MIXEDKV_INLINE static void arrange(i32v (&)[kWords]) {}
};

struct FitIq4Nl {
  using Block = block_iq4_nl;
  static constexpr int kValues = QK4_NL;
  static constexpr int kWords = 4;
  static constexpr LevelTable kTable{kLevelsIq4Nl, 16};
  static constexpr float kLevelsPerUnit = 1.0f;
  static constexpr uint8_t kMultipliers[9] = {151, 143, 137, 130, 125, 120, 115, 111, 107};
  MIXEDKV_INLINE static void arrange(i32v (&)[kWords]) {}
};

/// Adds the squared errors of values J and J + 16, d times byte J of either.
template <int J>
MIXEDKV_INLINE void add_squared_errors(const f32v *x, i32v low, i32v high, f32v d, f32v &sum) {
  const f32v level = to_f32(shift_right_signed<24>(shift_left<24 - 8 * J>(low)));
  const f32v upper = to_f32(shift_right_signed<24>(shift_left<24 - 8 * J>(high)));
  const f32v error = sub(x[J], mul(level, d)), above = sub(x[J + 16], mul(upper, d));
  sum = add(sum, mul(error, error));
  sum = add(sum, mul(above, above));
}

/// Of each of kLanes blocks the sum of squared errors, x being a value of every block.
template <typename L>
MIXEDKV_INLINE f32v squared_errors(const f32v (&x)[L::kValues], const typename L::Block *y) {
  alignas(64) int32_t words[L::kWords][kLanes];
  f16_t scales[kLanes];
  for (int b = 0; b < kLanes; ++b) {
    scales[b] = y[b].d;
    for (int w = 0; w < L::kWords; ++w)
      memcpy(&words[w][b], y[b].qs + 4 * w, 4);
  }
  const f32v d = mul(load(scales), set1(1.0f / L::kLevelsPerUnit));
  const i32v table = load_table(L::kTable.bytes[0]);
  f32v sum = zero();
  for (int w = 0; w < L::kWords; ++w) {
    const i32v codes = load_i32(words[w]);
    const i32v low = look_up(table, low_nibbles(codes)), high = look_up(table, high_nibbles(codes));
    add_squared_errors<0>(x + 4 * w, low, high, d, sum);
    add_squared_errors<1>(x + 4 * w, low, high, d, sum);
    add_squared_errors<2>(x + 4 * w, low, high, d, sum);
    add_squared_errors<3>(x + 4 * w, low, high, d, sum);
  }
  return sum;
}

/// kLanes blocks y[i], ggml's of the values at source[i], become those of fitted scales where these
/// err less. (Sums of 32 squares are rounded by less than half of what is asked for.) A function of
/// its own: what calls it would be several times as large, and no faster.
template <typename L, typename T>
MIXEDKV_NOINLINE void fit_blocks(const T *const *source, typename L::Block *y) noexcept {
  typename L::Block found[kLanes];
  search_levels<L>([source](int i) { return source[i]; }, kLanes, found);
  f32v x[L::kValues];
  f32v part[kLanes];
  for (int first = 0; first < L::kValues; first += kLanes) {
    for (int b = 0; b < kLanes; ++b)
      part[b] = load(source[b] + first);
    transpose(part);
    for (int i = 0; i < kLanes; ++i)
      x[first + i] = part[i];
  }
  const f32v error = squared_errors<L>(x, found);
  f32v limit = squared_errors<L>(x, y);
  limit = select_below(limit, set1(INFINITY), limit, zero()); // what overflows stays ggml's
  limit = select_below(limit, set1(kFitLeastError), zero(), limit);
  float better[kLanes];
  store(better, select_below(mul(error, set1(kFitMargin)), limit, set1(1.0f), zero()));
  for (int b = 0; b < kLanes; ++b)
    if (better[b] != 0.0f)
      y[b] = found[b];
}

/// Q: ggml's, of whole rows.
template <typename L, typename T, void Q(const T *, void *, size_t) noexcept>
void fitted_row_from(const T *x, void *y, size_t n) noexcept {
  Q(x, y, n);
  typename L::Block *blocks = static_cast<typename L::Block *>(y);
  const size_t num_blocks = n / L::kValues;
  for (size_t b = 0; b < num_blocks; b += kLanes) {
    const size_t count = num_blocks - b < kLanes ? num_blocks - b : kLanes;
    const T *source[kLanes];
    typename L::Block part[kLanes]; // the last block again where there are no more
    for (size_t i = 0; i < kLanes; ++i) {
      const size_t block = b + (i < count ? i : count - 1);
      source[i] = x + block * L::kValues;
      part[i] = blocks[block];
    }
    fit_blocks<L>(source, part);
    memcpy(blocks + b, part, count * sizeof part[0]);
  }
}

/// Tiles: the format's, whose blocks are ggml's.
template <typename L, typename Tiles> struct FittedTiles : Tiles {
  template <typename T, typename F>
  MIXEDKV_INLINE static void quantize(F source, typename L::Block *y) {
    Tiles::template quantize<T>(source, y);
    const T *rows[kTileTokens];
    for (int i = 0; i < kTileTokens; ++i)
      rows[i] = source(i);
    for (int first = 0; first < kTileTokens; first += kLanes)
      fit_blocks<L>(rows + first, y + first);
  }
};

// --- the table ---------------------------------------------------------------------------------

constexpr RowKernels fitted_rows_q4_0() {
  RowKernels k = rows_q4_0();
  k.fit_f32 = fitted_row_from<FitQ4_0, float, q4_0_from_f32>;
  k.fit_f16 = fitted_row_from<FitQ4_0, f16_t, q4_0_from_f16>;
  return k;
}
constexpr RowKernels fitted_rows_iq4_nl() {
  RowKernels k = rows_iq4_nl();
  k.fit_f32 = fitted_row_from<FitIq4Nl, float, row_from<float, block_iq4_nl>>;
  k.fit_f16 = fitted_row_from<FitIq4Nl, f16_t, row_from<f16_t, block_iq4_nl>>;
  return k;
}

template <typename F> constexpr TileKernels fitted_tiles(TileKernels k) {
  k.fit_keys_f32 = pack_keys<float, F>;
  k.fit_keys_f16 = pack_keys<f16_t, F>;
  k.fit_values_f32 = pack_nibbles<float, F>;
  k.fit_values_f16 = pack_nibbles<f16_t, F>;
  return k;
}
constexpr TileKernels fitted_tiles_q4_0() {
  return fitted_tiles<FittedTiles<FitQ4_0, Q4_0Tiles>>(make_tiles_q4_0());
}
constexpr TileKernels fitted_tiles_iq4_nl() {
  return fitted_tiles<FittedTiles<FitIq4Nl, Iq4NlTiles>>(make_tiles_iq4_nl());
}
