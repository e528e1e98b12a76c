// Advanced SIMD of every aarch64 machine; no extension.
//
// fmla does the sums, fcvtl the halves, zips make floats of nibbles (simd_neon.h), faddp adds up
// four vectors of partial sums to four scores. Tiles of 4 x 4 leave half of the 32 registers to
// keys, queries and unpacking. Rejected: widening a nibble to an integer and converting it (four
// instructions more for sixteen values); arithmetic in f16 (not in the base set, and 11 bits are
// not enough).
#include "simd_common.h"

#include <arm_neon.h>

namespace mixedkv {
namespace {

#include "simd_neon.h"

#include "convert.inl"

#include "quantize.inl"

#include "attention.inl"

#include "scores.inl"

} // namespace

const Kernels kernels_neon = {
    "neon",
    f32_to_f16,
    f16_to_f32,
    quantize_row_q4_0_f32,
    quantize_row_q4_0_f16,
    dequantize_row_q4_0_f32,
    dequantize_row_q4_0_f16,
    all_finite_f32,
    all_finite_f16,
    {qk_f32, qk_f16, qk_q4_0},
    {pv_f32, pv_f16, pv_q4_0},
    row_max,
    exp_sum,
    soft_cap,
    scale,
    axpy,
};

} // namespace mixedkv
