// Advanced SIMD of every aarch64 machine; no extension.
//
// fmla does the sums, fcvtl the halves, zips make floats of nibbles (simd_neon.h), faddp adds up
// four vectors of partial sums to four scores. Tiles of 4 x 4 leave half of the 32 registers to
// keys, queries and unpacking. Rejected: widening a nibble to an integer and converting it (four
// instructions more for sixteen values); arithmetic in f16 (not in the base set, and 11 bits are
// not enough).
#define MIXEDKV_ISA neon
#include "simd_common.h"

#include <arm_neon.h>

namespace mixedkv {
namespace {

#include "simd_neon.h"

#include "integers_neon.h"

#include "bytes_neon.h"

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
