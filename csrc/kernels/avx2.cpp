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
#include "simd_common.h"

#include <immintrin.h>

namespace mixedkv {
namespace {

#include "simd_avx2.h"

#include "integers_avx2.h"

#include "bytes_x86.h"

#include "convert.inl"

#include "quantize.inl"

#include "attention.inl"

#include "scores.inl"

#include "packed.inl"

#include "packed_values.inl"

#include "transposed.inl"

#include "pack.inl"

} // namespace

#include "table.inl"

} // namespace mixedkv
