// AVX2 with FMA and F16C: Intel since Haswell (2013), AMD since Zen.
//
// vfmadd231ps does the sums, vcvtph2ps the halves, vpmovzxbd and a shift the nibbles. Sixteen
// registers are what limits the tiles: twelve sums, and keys taken one after the other.
// Rejected: vhaddps for sums over lanes (three operations where two will do); nibbles by vpermps,
// as in avx512.cpp (eight entries a register: two look-ups and a blend are no faster than
// conversion and FMA); unpacking the blocks of several keys before using them (it spills).
#include "simd_common.h"

#include <immintrin.h>

namespace mixedkv {
namespace {

#include "simd_avx2.h"

#include "convert.inl"

#include "quantize.inl"

#include "attention.inl"

#include "scores.inl"

} // namespace

const Kernels kernels_avx2 = {
    "avx2",
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
