// Advanced SIMD of every aarch64 machine; no extension.
//
// fmla does the sums, fcvtl the halves, zips make floats of nibbles (vocabulary/neon.inl), faddp
// adds up four vectors of partial sums to four scores. Tiles of 4 x 4 leave half of the 32
// registers to keys, queries and unpacking. Rejected: widening a nibble to an integer and
// converting it (four instructions more for sixteen values); arithmetic in f16 (not in the base
// set, and 11 bits are not enough).
#define MIXEDKV_ISA neon
#include "kernels/vocabulary/common.h"

#include <arm_neon.h>

namespace mixedkv {
namespace {

#include "kernels/vocabulary/neon.inl"

#include "kernels/vocabulary/neon_integers.inl"

#include "kernels/vocabulary/neon_bytes.inl"

#include "kernels/umbrella.inl"

} // namespace

constexpr Kernels MIXEDKV_TABLE(MIXEDKV_ISA) = make_kernels();

} // namespace mixedkv
