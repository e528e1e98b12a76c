// NL4: values to rows, in the vocabulary of common.h.

struct SearchNl4 {
  using Block = block_nl4;
  static constexpr int kValues = QNL4;
  static constexpr int kWords = 8;
  static constexpr LevelTable kTable{kLevelsNl4, 16};
  static constexpr float kLevelsPerUnit = 1.0f;
  static constexpr uint8_t kMultipliers[9] = {159, 149, 141, 134, 127, 121, 115, 110, 106};
  MIXEDKV_INLINE static void arrange(i32v (&)[kWords]) {}
};

template <typename F> MIXEDKV_INLINE void quantize_blocks(F source, int count, block_nl4 *y) {
  search_levels<SearchNl4>(source, count, y);
}

template <> struct BlockWords<block_nl4> {
  using Opened = Levels;
  static MIXEDKV_INLINE Levels open(const block_nl4 *block, int part) {
    return open_levels(kLevelsNl4, block->d, load_b16(block->qs + part * kNibbleCodeBytes));
  }
  template <int V> static MIXEDKV_INLINE f32v vector(const Levels &x) { return level<V>(x); }
  template <int V> static MIXEDKV_INLINE f32v exact(const Levels &x) { return level<V>(x); }
};

// --- the table ---------------------------------------------------------------------------------

constexpr RowKernels rows_nl4() { return quantized_rows<block_nl4>(); }
