#include "simd_common.h"

// GCC before 13 warns of its own header, which initialises undefined vectors with themselves
// (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

namespace mixedkv {
namespace {

#include "simd_avx512.h"

#include "convert.inl"

#include "quantize.inl"

#include "attention.inl"

#include "scores.inl"

} // namespace

const Kernels kernels_avx512 = {
    "avx512",
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
