// Token tiles of any format as f32 and as panels of bf16, by what a format says of its keys
// (tile_keys.inl) and values (tile_values.inl).

/// Codes of bytes B of words as they are opened.
template <typename K, int B> MIXEDKV_INLINE f32v key_codes(i32v x) {
  constexpr bool kFlipped = K::kOffset == 128;
  if (kFlipped)
    x = xor_i32(x, set1_i32(static_cast<int32_t>(0x80808080u)));
  const f32v code = to_f32(shift_right_signed<24>(shift_left<24 - 8 * B>(x)));
  return kFlipped ? code : sub(code, set1(static_cast<float>(K::kOffset)));
}

/// take(block, dim, token, x): x holds four dims of a block, from `dim` on, of a vector of tokens.
template <typename K, typename F>
MIXEDKV_INLINE void for_keys(const void *tile, int head_dim, F take) {
  const uint8_t *bytes = static_cast<const uint8_t *>(tile);
  const int num_blocks = head_dim / kTileBlock;
  for (int b = 0; b < num_blocks; ++b)
    for (int token = 0; token < kTileTokens; token += kLanes) {
      const f32v d = load(scale_at<K>(bytes, num_blocks, b, token));
      i32v words[kOpenWords<K>], codes[kWordsOfBlock];
      for (int w = 0; w < K::kCodeBytes / 4; ++w)
        words[w] = load_i32(bytes + ((b * K::kCodeBytes + w * 4) * kTileTokens + token * 4));
      if constexpr (kOpenWords<K> * 4 != K::kCodeBytes)
        K::complete(words);
      K::open(words, codes);
      for (int w = 0; w < kWordsOfBlock; ++w) {
        const f32v x[4] = {mul(key_codes<K, 0>(codes[w]), d), mul(key_codes<K, 1>(codes[w]), d),
                           mul(key_codes<K, 2>(codes[w]), d), mul(key_codes<K, 3>(codes[w]), d)};
        take(b * kTileBlock + 4 * w, token, x);
      }
    }
}

template <typename K> void any_keys_to_f32(const void *tile, int head_dim, float *kt) noexcept {
  for_keys<K>(tile, head_dim, [=](int dim, int token, const f32v(&x)[4]) {
    for (int i = 0; i < 4; ++i)
      store(kt + (dim + i) * kTileTokens + token, x[i]);
  });
}

/// take(token, dim, x, y): a vector of dims of tokens `token` and `token` + 1.
template <typename V, int P, typename X, typename F>
MIXEDKV_INLINE void value_pairs(const X &words, const float *d, int token, int dim, F take) {
  constexpr int kShift = P % 2 ? V::kHighShift : 0;
  const i32v pair = V::template pair<P>(words);
  const i32v offset = set1_i32(V::kOffset);
  const i32v x = shift_right_signed<kShift>(and_i32(pair, set1_i32(0xffff)));
  const i32v y = shift_right_signed<kShift>(shift_right_signed<16>(pair));
  take(token + 2 * P, dim, mul(to_f32(sub_i32(x, offset)), set1(d[token + 2 * P])),
       mul(to_f32(sub_i32(y, offset)), set1(d[token + 2 * P + 1])));
  if constexpr (P + 1 < V::kWordTokens / 2)
    value_pairs<V, P + 1>(words, d, token, dim, take);
}

template <typename V, typename F>
MIXEDKV_INLINE void for_values(const void *tile, int head_dim_v, F take) {
  const uint8_t *bytes = static_cast<const uint8_t *>(tile);
  const int num_blocks = head_dim_v / kTileBlock;
  for (int b = 0; b < num_blocks; ++b) {
    float d[kTileTokens];
    f16_to_f32(scale_at<V>(bytes, num_blocks, b, 0), d, kTileTokens);
    for (int token = 0; token < kTileTokens; token += V::kWordTokens)
      for (int i = b * kTileBlock; i < (b + 1) * kTileBlock; i += kLanes) {
        if constexpr (V::kWordTokens == kTileTokens) {
          const uint8_t *block = bytes + b * kTileTokens * V::kCodeBytes;
          value_pairs<V, 0>(V::open_block(block, i % kTileBlock), d, token, i, take);
        } else {
          const uint8_t *words = bytes + (token / V::kWordTokens * head_dim_v + i) * 4;
          value_pairs<V, 0>(V::open(load_i32(words)), d, token, i, take);
        }
      }
  }
}

template <typename V>
void any_values_to_f32(const void *tile, int head_dim_v, float *values) noexcept {
  for_values<V>(tile, head_dim_v, [=](int token, int dim, f32v x, f32v y) {
    store(values + token * head_dim_v + dim, x);
    store(values + (token + 1) * head_dim_v + dim, y);
  });
}

#if defined(MIXEDKV_BF16)
template <typename K> void any_key_panel(const void *tile, int head_dim, bf16_t *panel) noexcept {
  for_keys<K>(tile, head_dim, [=](int dim, int token, const f32v(&x)[4]) {
    for (int i = 0; i < 4; i += 2)
      store_i32(panel + (dim + i) * kPanelColumns + 2 * token, round_interleaved(x[i], x[i + 1]));
  });
}

template <typename V>
void any_value_panels(const void *tile, int head_dim_v, bf16_t *panels, size_t ld_panel) noexcept {
  for_values<V>(tile, head_dim_v, [=](int token, int dim, f32v x, f32v y) {
    store_i32(panels + static_cast<size_t>(dim / kPanelColumns) * ld_panel +
                  dim % kPanelColumns * 2 + token * kPanelColumns,
              round_interleaved(x, y));
  });
}
#endif
