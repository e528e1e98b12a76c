// Advanced SIMD with the dot product instructions of Armv8.2 (FEAT_DotProd; every server core since
// Neoverse N1, every Apple M, most phones since 2018): neon.cpp's loops, but for keys in Q4_0.
//
// With vectors of four floats, the 32 products of a (row, key) block take eight FMAs, and four
// nibbles two or three instructions on their way to floats. sdot takes 16 products at once, on
// nibbles that only had 8 taken off. One 8-bit term per query value would cost 5e-3 of accuracy;
// two (a coarse one and its remainder) leave about 1e-5 of the scores' magnitude, for twice the
// sdots. Instructions of the compiled inner loop for a (row, key) block of 32: 11 at four rows and
// 17 at one, where neon.cpp takes 25 and 55. Counted, not timed. Rejected: f16 arithmetic
// (FEAT_FP16), whose 11 bits are not enough for sums over head_dim; one integer sum over several
// blocks, since each has a scale of its own. FEAT_I8MM's smmla halves the dot products over packed
// keys (loops/tile_products.inl); over rows in ggml's order they would have to be taken in pairs.
#define MIXEDKV_DOTPROD 1
#if !defined(MIXEDKV_ISA)
#define MIXEDKV_ISA neon_dotprod
#endif
#include "kernels/vocabulary/common.h"

#include <arm_neon.h>

namespace mixedkv {
namespace {

#include "kernels/vocabulary/neon.inl"

#include "kernels/vocabulary/neon_integers.inl"

#include "kernels/vocabulary/neon_bytes.inl"

#if defined(MIXEDKV_BF16)
#include "kernels/vocabulary/neon_bf16.inl"
#endif

#include "kernels/umbrella.inl"

#include "kernels/formats/q4_0_rows_dotprod.inl"

constexpr Kernels make_dotprod_kernels() {
  Kernels k = make_kernels();
  k.rows[static_cast<int>(Format::q4_0)].qk = qk_q4_0_split;
  return k;
}

} // namespace

constexpr Kernels MIXEDKV_TABLE(MIXEDKV_ISA) = make_dotprod_kernels();

} // namespace mixedkv
