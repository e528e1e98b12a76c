// NL3: values to rows, in the vocabulary of common.h.

struct SearchNl3 {
  using Block = block_nl3;
  static constexpr int kValues = QNL3;
  static constexpr int kWords = 3;
  static constexpr LevelTable kTable{kLevelsNl3, 8};
  static constexpr float kLevelsPerUnit = 1.0f;
  static constexpr uint8_t kMultipliers[5] = {148, 137, 127, 119, 111};
  /// The last four bytes' bits become the top bits of the others' nibbles.
  MIXEDKV_INLINE static void arrange(i32v (&x)[4]) {
    const i32v ones = set1_i32(0x11111111);
    x[0] = add_i32(x[0], shift_left<3>(and_i32(x[3], ones)));
    x[1] = add_i32(x[1], shift_left<3>(and_i32(shift_right_signed<1>(x[3]), ones)));
    x[2] = add_i32(x[2], shift_left<3>(and_i32(shift_right_signed<2>(x[3]), ones)));
  }
};

template <typename F> MIXEDKV_INLINE void quantize_blocks(F source, int count, block_nl3 *y) {
  search_levels<SearchNl3>(source, count, y);
}

template <> struct BlockWords<block_nl3> {
  using Opened = Levels;
  static MIXEDKV_INLINE Levels open(const block_nl3 *block) {
    uint64_t low;
    uint32_t high;
    memcpy(&low, block->qs, sizeof low);
    memcpy(&high, block->qs + sizeof low, sizeof high);
    const uint64_t last =
        (low >> 3 & 0x11111111u) | (low >> 34 & 0x22222222u) | (high >> 1 & 0x44444444u);
    // Top bits of nibbles stay: each level is there twice. By registers: a wide read of narrow
    // stores would wait for all of them.
    return open_levels(SearchNl3::kTable.levels, block->d, b16_of(low, last << 32 | high));
  }
  template <int V> static MIXEDKV_INLINE f32v vector(const Levels &x) { return level<V>(x); }
  template <int V> static MIXEDKV_INLINE f32v exact(const Levels &x) { return level<V>(x); }
};

// --- the table ---------------------------------------------------------------------------------

constexpr RowKernels rows_nl3() { return quantized_rows<block_nl3>(); }
