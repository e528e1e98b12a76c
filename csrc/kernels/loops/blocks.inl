// Formats whose values come in blocks that share a scale, as loops read them.

/// Whether values come in blocks of kBlockValues, or each on its own.
template <typename T> constexpr bool is_blocks = true;
template <> constexpr bool is_blocks<float> = false;
template <> constexpr bool is_blocks<f16_t> = false;
template <> constexpr bool is_blocks<bf16_t> = false;

enum : int { kBlockValues = 32 };
constexpr int kVectors = kBlockValues / kLanes; // in a block

/// How blocks of T are read; each format specialises it: Opened, what open(block) makes of a block
/// so that it can be read vector by vector; vector<V>(opened), values V * kLanes on as f32, but for
/// the sign of zeros, and NaN where d is infinite; exact<V>(opened): in all bits.
template <typename T> struct BlockWords;
template <typename T> using Opened = typename BlockWords<T>::Opened;

/// Blocks of more values are read in parts of kBlockValues: how many of these there are in one.
/// open(block, part) opens one then.
template <typename T> constexpr int kParts = 1;
template <> constexpr int kParts<block_nl4> = QNL4 / kBlockValues;

/// Values b * kBlockValues on of a row.
template <typename T> MIXEDKV_INLINE Opened<T> open_part(const T *row, int b) {
  if constexpr (kParts<T> == 1)
    return BlockWords<T>::open(row + b);
  else
    return BlockWords<T>::open(row + b / kParts<T>, b % kParts<T>);
}

template <typename B, bool Exact, int V = 0, typename T>
MIXEDKV_INLINE void store_block(const Opened<B> &opened, T *y) {
  store(y + V * kLanes, Exact ? BlockWords<B>::template exact<V>(opened)
                              : BlockWords<B>::template vector<V>(opened));
  if constexpr ((V + 1) * kLanes < kBlockValues)
    store_block<B, Exact, V + 1>(opened, y);
}
