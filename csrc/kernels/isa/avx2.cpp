// AVX2 with FMA and F16C: Intel since Haswell (2013), AMD since Zen.
//
// vfmadd231ps does the sums, vcvtph2ps the halves, vpmovzxbd and a shift the nibbles. Sixteen
// registers are what limits the tiles: twelve sums, and keys taken one after the other.
// Rejected: vhaddps for sums over lanes (three operations where two will do); nibbles by vpermps,
// as in avx512.cpp (eight entries a register: two look-ups and a blend are no faster than
// conversion and FMA); unpacking the blocks of several keys before using them (it spills).
#if !defined(MIXEDKV_ISA)
#define MIXEDKV_ISA avx2
#endif
#include "kernels/vocabulary/common.h"

#include <immintrin.h>

namespace mixedkv {
namespace {

#include "kernels/vocabulary/avx2.inl"

#include "kernels/vocabulary/avx2_integers.inl"

#include "kernels/vocabulary/x86_bytes.inl"

#include "kernels/umbrella.inl"

} // namespace

constexpr Kernels MIXEDKV_TABLE(MIXEDKV_ISA) = make_kernels();

} // namespace mixedkv
