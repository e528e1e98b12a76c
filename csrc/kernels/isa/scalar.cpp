// The oracle: plain loops, one value at a time, no SIMD and nothing shared with the other ISA
// files, so that agreement with them means something. It is also the fallback of machines that
// nobody wrote vectors for. Speed was traded for plainness everywhere: f16 is converted by integer
// arithmetic, exp and tanh go through double.

#include "formats/byte_tile.h"
#include "formats/levels.h"
#include "formats/nibble_tile.h"
#include "formats/nl3_tile.h"
#include "kernels/isa_tables.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace mixedkv {
namespace {

#include "kernels/scalar/numbers.inl"

#include "kernels/scalar/scores.inl"

#include "kernels/scalar/hadamard.inl"

#include "kernels/scalar/bf16.inl"

#include "kernels/scalar/rows.inl"

#include "kernels/scalar/tiles.inl"

#include "kernels/scalar/q4_0.inl"

#include "kernels/scalar/q8_0.inl"

#include "kernels/scalar/iq4_nl.inl"

#include "kernels/scalar/level_search.inl"

#include "kernels/scalar/fitted_scales.inl"

#include "kernels/scalar/nl4.inl"

#include "kernels/scalar/nl3.inl"

constexpr TileKernels tiles_q4_0 = fitted_tiles<block_q4_0>();
constexpr TileKernels tiles_q8_0 = tiles_of<block_q8_0>();
constexpr TileKernels tiles_iq4_nl = fitted_tiles<block_iq4_nl>();
constexpr TileKernels tiles_nl4 = always_fitted(tiles_of<block_nl4>());
constexpr TileKernels tiles_nl3 = always_fitted(tiles_of<block_nl3>());

constexpr Kernels make_kernels() {
  Kernels k{};
  k.name = "scalar";
  set_rows(k, Format::f32, rows_f32());
  set_rows(k, Format::f16, rows_f16());
  set_rows(k, Format::q4_0, fitted_rows<block_q4_0>());
  set_rows(k, Format::q8_0, block_rows<block_q8_0>());
  set_rows(k, Format::bf16, rows_bf16());
  set_rows(k, Format::iq4_nl, fitted_rows<block_iq4_nl>());
  set_rows(k, Format::nl4, always_fitted(block_rows<block_nl4>()));
  set_rows(k, Format::nl3, always_fitted(block_rows<block_nl3>()));
  set_tiles(k, Format::q4_0, &tiles_q4_0);
  set_tiles(k, Format::q8_0, &tiles_q8_0);
  set_tiles(k, Format::iq4_nl, &tiles_iq4_nl);
  set_tiles(k, Format::nl4, &tiles_nl4);
  set_tiles(k, Format::nl3, &tiles_nl3);
  k.all_finite_f32 = all_finite_f32;
  k.all_finite_f16 = all_finite_f16;
  k.largest_magnitude = largest_magnitude;
  k.qk_transposed = qk_transposed;
  k.row_max = row_max;
  k.exp_sum = exp_sum;
  k.soft_cap = soft_cap;
  k.scale = scale;
  k.add_constants = add_constants;
  k.axpy = axpy;
  k.hadamard = hadamard;
  k.bf16 = &bf16_kernels;
  return k;
}

} // namespace

constexpr Kernels kernels_scalar = make_kernels();

} // namespace mixedkv
