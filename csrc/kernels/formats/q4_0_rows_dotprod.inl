// Q4_0 rows against query rows in two 8-bit terms, by sdot; why: isa/neon_dotprod.cpp.

enum : int { kGroupRows = 4, kGroupBlocks = 16 };

/// Up to 512 dims of a query row in two 8-bit terms: about (254 * high + low) * scale.
struct SplitQuery {
  int8_t high[kGroupBlocks * QK4_0];
  int8_t low[kGroupBlocks * QK4_0];
  float scale[kGroupBlocks];
};

/// With s = largest magnitude / 127, high is x / s rounded and low 254 times what that left, so
/// that a value is off by at most s / 508. A block with a NaN or infinity in it makes NaN.
MIXEDKV_INLINE void split_block(const float *x, int8_t *high, int8_t *low, float *scale) {
  f32v largest = zero();
  for (int i = 0; i < QK4_0; i += kLanes)
    largest = vmaxq_f32(largest, abs_of(load(x + i))); // fmax hands a NaN on
  const float magnitude = vmaxvq_f32(largest);
  const bool finite = (bits_of(magnitude) & 0x7f800000u) != 0x7f800000u;
  // What is too small to be inverted contributes nothing that f32 scores could show.
  const float inverse = finite && magnitude > 1e-35f ? 127.0f / magnitude : 0.0f;
  *scale = finite ? magnitude * (1.0f / (127.0f * 254.0f)) : magnitude - magnitude;
  for (int i = 0; i < QK4_0; i += 2 * kLanes) {
    int16x4_t high16[2], low16[2];
    for (int half = 0; half < 2; ++half) {
      const f32v scaled = vmulq_n_f32(load(x + i + half * kLanes), inverse);
      const f32v rounded = rint(scaled);
      high16[half] = vmovn_s32(vcvtq_s32_f32(rounded));
      low16[half] = vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(sub(scaled, rounded), 254.0f)));
    }
    vst1_s8(high + i, vqmovn_s16(vcombine_s16(high16[0], high16[1])));
    vst1_s8(low + i, vqmovn_s16(vcombine_s16(low16[0], low16[1])));
  }
}

/// Four keys by R rows: the integer sums of a block, transposed and added up, are the four keys'
/// lanes, so that block scales are one multiplication and no sum over lanes is left for the end.
template <int R>
void qk_split(const SplitQuery *q, const Rows &k, int num_keys, int first_block, int num_blocks,
              float *scores, size_t ld_scores, bool add_to_scores) noexcept {
  for (int j = 0; j < num_keys; j += 4) {
    const int count = num_keys - j < 4 ? num_keys - j : 4;
    const block_q4_0 *keys[4];
    for (int c = 0; c < 4; ++c)
      keys[c] = row_at<block_q4_0>(k, j + (c < count ? c : count - 1)) + first_block;
    f32v sum[R];
    for (int r = 0; r < R; ++r)
      sum[r] = zero();
    for (int b = 0; b < num_blocks; ++b) {
      int8x16_t k_low[4], k_high[4];
      f16_t d[4];
      for (int c = 0; c < 4; ++c) {
        const uint8x16_t bytes = vld1q_u8(keys[c][b].qs);
        const int8x16_t eight = vdupq_n_s8(8);
        k_low[c] = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15))), eight);
        k_high[c] = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4)), eight);
        d[c] = keys[c][b].d;
      }
      const f32v scales = load(d);
      for (int r = 0; r < R; ++r) {
        const int8_t *q_high = q[r].high + b * QK4_0, *q_low = q[r].low + b * QK4_0;
        const int8x16_t high0 = vld1q_s8(q_high), high1 = vld1q_s8(q_high + 16);
        const int8x16_t low0 = vld1q_s8(q_low), low1 = vld1q_s8(q_low + 16);
        int32x4_t products[4]; // at most 8 * 127 * 255 * 8: far from overflow
        for (int c = 0; c < 4; ++c) {
          const int32x4_t nothing = vdupq_n_s32(0);
          const int32x4_t of_high =
              vdotq_s32(vdotq_s32(nothing, high0, k_low[c]), high1, k_high[c]);
          const int32x4_t weighted = vmulq_n_s32(of_high, 254);
          products[c] = vdotq_s32(vdotq_s32(weighted, low0, k_low[c]), low1, k_high[c]);
        }
        const int32x4_t sums =
            vpaddq_s32(vpaddq_s32(products[0], products[1]), vpaddq_s32(products[2], products[3]));
        sum[r] = fma(vcvtq_f32_s32(sums), vmulq_n_f32(scales, q[r].scale[b]), sum[r]);
      }
    }
    for (int r = 0; r < R; ++r) {
      float *out = scores + at(r, ld_scores, j);
      if (add_to_scores)
        sum[r] = add(sum[r], count == 4 ? load(out) : load_n(out, count));
      if (count == 4)
        store(out, sum[r]);
      else
        store_n(out, sum[r], count);
    }
  }
}

void qk_q4_0_split(const float *q, size_t ld_q, int num_rows, const Rows *k, int num_keys,
                   int head_dim, float *scores, size_t ld_scores) noexcept {
  SplitQuery split[kGroupRows];
  const int all_blocks = head_dim / QK4_0;
  for (int row = 0; row < num_rows; row += kGroupRows) {
    const int rows = num_rows - row < kGroupRows ? num_rows - row : kGroupRows;
    float *group_scores = scores + at(row, ld_scores, 0);
    for (int first = 0; first < all_blocks; first += kGroupBlocks) {
      const int blocks = all_blocks - first < kGroupBlocks ? all_blocks - first : kGroupBlocks;
      for (int r = 0; r < rows; ++r)
        for (int b = 0; b < blocks; ++b)
          split_block(q + at(row + r, ld_q, (first + b) * QK4_0), split[r].high + b * QK4_0,
                      split[r].low + b * QK4_0, split[r].scale + b);
      const auto run = rows == 1   ? qk_split<1>
                       : rows == 2 ? qk_split<2>
                       : rows == 3 ? qk_split<3>
                                   : qk_split<4>;
      run(split, *k, num_keys, first, blocks, group_scores, ld_scores, first > 0);
    }
  }
}
