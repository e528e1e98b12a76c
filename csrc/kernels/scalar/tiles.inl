// Token tiles of any format, value by value; a prepared query is the query. A format specialises
// InTile with where the block of a token's key and the value of a token's dim are.

template <typename Block> struct InTile;

/// Nibbles as nibble_tile.h has them, 32 values after the other; Flip: what values' nibbles are
/// changed by.
template <typename Block, uint8_t Flip> struct NibbleInTile {
  enum : int { kCodes = sizeof(Block::qs), kParts = kCodes / kNibbleCodeBytes };
  static size_t key_byte(int block, int i, int token) {
    return static_cast<size_t>(block * kCodes * kTileTokens + (i / 4 * kTileTokens + token) * 4 +
                               i % 4);
  }
  static Block key(const uint8_t *tile, int num_blocks, int block, int token) {
    Block out;
    for (int i = 0; i < kCodes; ++i)
      out.qs[i] = tile[key_byte(block, i, token)];
    out.d = *tile_scale(tile, kCodes, num_blocks, block, token);
    return out;
  }
  static void put_key(uint8_t *tile, int num_blocks, int block, int token, const Block &from) {
    for (int i = 0; i < kCodes; ++i)
      tile[key_byte(block, i, token)] = from.qs[i];
    *tile_scale(tile, kCodes, num_blocks, block, token) = from.d;
  }
  static const uint8_t *word(const uint8_t *tile, int num_blocks, int block, int i, int token) {
    return tile + ((token / 8 * num_blocks + block) * kParts * 32 + i) * 4;
  }
  /// Which byte of a block's holds value i, and from which bit on.
  static int byte_of(int i) { return i / 32 * kNibbleCodeBytes + i % kNibbleCodeBytes; }
  static int shift_of(int i) { return i % 32 / kNibbleCodeBytes * 4; }
  static Block value(const uint8_t *tile, int num_blocks, int block, int token) {
    Block out;
    memset(out.qs, 0, sizeof out.qs);
    for (int i = 0; i < kValuesOf<Block>; ++i) {
      uint32_t bits;
      memcpy(&bits, word(tile, num_blocks, block, i, token), sizeof bits);
      const uint32_t nibble = (bits >> nibble_shift(token) & 15u) ^ Flip;
      out.qs[byte_of(i)] |= static_cast<uint8_t>(nibble << shift_of(i));
    }
    out.d = *tile_scale(tile, kCodes, num_blocks, block, token);
    return out;
  }
  static void put_value(uint8_t *tile, int num_blocks, int block, int token, const Block &from) {
    for (int i = 0; i < kValuesOf<Block>; ++i) {
      const uint32_t nibble =
          (static_cast<uint32_t>(from.qs[byte_of(i)]) >> shift_of(i) & 15u) ^ Flip;
      uint8_t *at = const_cast<uint8_t *>(word(tile, num_blocks, block, i, token));
      uint32_t bits;
      memcpy(&bits, at, sizeof bits);
      bits &= ~(15u << nibble_shift(token));
      bits |= nibble << nibble_shift(token);
      memcpy(at, &bits, sizeof bits);
    }
    *tile_scale(tile, kCodes, num_blocks, block, token) = from.d;
  }
};

/// Signed bytes as byte_tile.h has them.
template <typename Block> struct ByteInTile {
  static size_t key_byte(int block, int i, int token) {
    return static_cast<size_t>(((block * 8 + i / 4) * kTileTokens + token) * 4 + i % 4);
  }
  static size_t value_byte(int num_blocks, int block, int i, int token) {
    static const int place[4] = {0, 2, 1, 3};
    return static_cast<size_t>(((token / 4 * num_blocks + block) * kByteCodeBytes + i) * 4 +
                               place[token % 4]);
  }
  static Block key(const uint8_t *tile, int num_blocks, int block, int token) {
    Block out;
    for (int i = 0; i < kByteCodeBytes; ++i)
      out.qs[i] = static_cast<int8_t>(tile[key_byte(block, i, token)] - 128);
    out.d = *tile_scale(tile, kByteCodeBytes, num_blocks, block, token);
    return out;
  }
  static void put_key(uint8_t *tile, int num_blocks, int block, int token, const Block &from) {
    for (int i = 0; i < kByteCodeBytes; ++i)
      tile[key_byte(block, i, token)] = static_cast<uint8_t>(from.qs[i] + 128);
    *tile_scale(tile, kByteCodeBytes, num_blocks, block, token) = from.d;
  }
  static Block value(const uint8_t *tile, int num_blocks, int block, int token) {
    Block out;
    for (int i = 0; i < kByteCodeBytes; ++i)
      out.qs[i] = static_cast<int8_t>(tile[value_byte(num_blocks, block, i, token)] - 128);
    out.d = *tile_scale(tile, kByteCodeBytes, num_blocks, block, token);
    return out;
  }
  static void put_value(uint8_t *tile, int num_blocks, int block, int token, const Block &from) {
    for (int i = 0; i < kByteCodeBytes; ++i)
      tile[value_byte(num_blocks, block, i, token)] = static_cast<uint8_t>(from.qs[i] + 128);
    *tile_scale(tile, kByteCodeBytes, num_blocks, block, token) = from.d;
  }
};

template <typename Block> float tile_key(const void *tile, int head_dim, int i, int token) {
  return BlockMath<Block>::value(InTile<Block>::key(static_cast<const uint8_t *>(tile),
                                                    head_dim / kValuesOf<Block>,
                                                    i / kValuesOf<Block>, token),
                                 i % kValuesOf<Block>);
}
template <typename Block> float tile_value(const void *tile, int head_dim, int i, int token) {
  return BlockMath<Block>::value(InTile<Block>::value(static_cast<const uint8_t *>(tile),
                                                      head_dim / kValuesOf<Block>,
                                                      i / kValuesOf<Block>, token),
                                 i % kValuesOf<Block>);
}

void prepare_tile_query(const float *q, size_t ld_q, int num_rows, int head_dim,
                        float *prepared) noexcept {
  const size_t n = static_cast<size_t>(head_dim);
  for (size_t r = 0; r < static_cast<size_t>(num_rows); ++r)
    memcpy(prepared + r * tile_query_floats(n), q + r * ld_q, n * sizeof(float));
}

template <typename Block>
void tile_keys_to_f32(const void *tile, int head_dim, float *kt) noexcept {
  for (int i = 0; i < head_dim; ++i)
    for (int token = 0; token < kTileTokens; ++token)
      *kt++ = tile_key<Block>(tile, head_dim, i, token);
}

template <typename Block>
void tile_values_to_f32(const void *tile, int head_dim_v, float *values) noexcept {
  for (int token = 0; token < kTileTokens; ++token)
    for (int i = 0; i < head_dim_v; ++i)
      *values++ = tile_value<Block>(tile, head_dim_v, i, token);
}

template <typename Block>
void qk_tiles(const float *prepared, int num_rows, const Rows *tiles, int num_tiles, int head_dim,
              float *scores, size_t ld_scores) noexcept {
  const size_t ld = tile_query_floats(static_cast<size_t>(head_dim));
  for (int t = 0; t < num_tiles; ++t)
    for (int token = 0; token < kTileTokens; ++token)
      for (int r = 0; r < num_rows; ++r) {
        const float *q = prepared + static_cast<size_t>(r) * ld;
        float sum = 0.0f;
        for (int b = 0; b < head_dim / kValuesOf<Block>; ++b) {
          const Block block =
              InTile<Block>::key(row_at<uint8_t>(*tiles, t), head_dim / kValuesOf<Block>, b, token);
          for (int i = 0; i < kValuesOf<Block>; ++i)
            sum += q[b * kValuesOf<Block> + i] * BlockMath<Block>::value(block, i);
        }
        scores[static_cast<size_t>(r) * ld_scores + static_cast<size_t>(t * kTileTokens + token)] =
            sum;
      }
}

template <typename Block>
void pv_tiles(const float *p, size_t ld_p, int num_rows, const Rows *tiles, int num_tiles,
              int head_dim_v, float *acc, size_t ld_acc) noexcept {
  for (int r = 0; r < num_rows; ++r)
    for (int b = 0; b < head_dim_v / kValuesOf<Block>; ++b) {
      float sums[kValuesOf<Block>] = {};
      for (int j = 0; j < num_tiles * kTileTokens; ++j) {
        const float weight = p[static_cast<size_t>(r) * ld_p + static_cast<size_t>(j)];
        if (weight == 0.0f)
          continue;
        const Block block = InTile<Block>::value(row_at<uint8_t>(*tiles, j / kTileTokens),
                                                 head_dim_v / kValuesOf<Block>, b, j % kTileTokens);
        for (int i = 0; i < kValuesOf<Block>; ++i)
          sums[i] += weight * BlockMath<Block>::value(block, i);
      }
      for (int i = 0; i < kValuesOf<Block>; ++i)
        acc[static_cast<size_t>(r) * ld_acc + static_cast<size_t>(b * kValuesOf<Block> + i)] +=
            sums[i];
    }
}

void read_values(const float *row, int n, float *x) {
  memcpy(x, row, static_cast<size_t>(n) * sizeof(float));
}
void read_values(const f16_t *row, int n, float *x) {
  for (int i = 0; i < n; ++i)
    x[i] = half_to_float(row[i]);
}

template <typename Block, typename T, bool Keys, typename Math = BlockMath<Block>>
void pack(const void *const *rows, int head_dim, void *tile) noexcept {
  const int num_blocks = head_dim / kValuesOf<Block>;
  for (int token = 0; token < kTileTokens; ++token)
    for (int b = 0; rows[token] && b < num_blocks; ++b) {
      float x[kValuesOf<Block>];
      read_values(static_cast<const T *>(rows[token]) + b * kValuesOf<Block>, kValuesOf<Block>, x);
      Block block;
      Math::quantize(x, &block);
      (Keys ? InTile<Block>::put_key : InTile<Block>::put_value)(static_cast<uint8_t *>(tile),
                                                                 num_blocks, b, token, block);
    }
}

template <typename Block> constexpr TileKernels tiles_of() {
  TileKernels k{};
  k.prepare_query = prepare_tile_query;
  k.qk = qk_tiles<Block>;
  k.pv = pv_tiles<Block>;
  k.values_to_f32 = tile_values_to_f32<Block>;
  k.keys_to_f32 = tile_keys_to_f32<Block>;
  k.pack_keys_f32 = pack<Block, float, true>;
  k.pack_keys_f16 = pack<Block, f16_t, true>;
  k.pack_values_f32 = pack<Block, float, false>;
  k.pack_values_f16 = pack<Block, f16_t, false>;
  k.key_panel = bf16_tile_key_panel<Block>;
  k.value_panels = bf16_tile_value_panels<Block>;
  return k;
}
