// AVX-512 F, BW, DQ, VL: Intel servers since Skylake, AMD since Zen 4.
//
// Twice AVX2's width and registers, masks for tails, and vpermps over sixteen entries, which turns
// a nibble into its value (q - 8) * d in one look-up. d comes by vpbroadcastw from memory and
// vcvtph2ps of the whole vector: through a general register, as in AVX2, one row of queries took a
// fifth longer. Sums over lanes are made by unpack and shuffle, four vectors at a time.
// Rejected: keys one after the other, as in avx2.cpp (with 32 registers it is better to have four
// blocks under way at once: 10% at four rows). VNNI needs nibbles in another order than
// a block's to pay: avx512_vnni.cpp.
#if !defined(MIXEDKV_ISA)
#define MIXEDKV_ISA avx512
#endif
#include "kernels/vocabulary/common.h"

// GCC before 13 warns of its own header, which initialises undefined vectors with themselves
// (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

namespace mixedkv {
namespace {

#include "kernels/vocabulary/avx512.inl"

#include "kernels/vocabulary/avx512_integers.inl"

#include "kernels/vocabulary/x86_bytes.inl"

#if defined(MIXEDKV_BF16)
#include "kernels/vocabulary/avx512_bf16.inl"
#endif

#include "kernels/umbrella.inl"

} // namespace

constexpr Kernels MIXEDKV_TABLE(MIXEDKV_ISA) = make_kernels();

} // namespace mixedkv
