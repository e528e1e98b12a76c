// Everything that is written once in the vocabulary of common.h, for an instruction set's page to
// include after its words: loops that know no format, then the formats, then the table.

#include "kernels/loops/convert.inl"

#include "kernels/loops/blocks.inl"

#include "kernels/loops/rows.inl"

#include "kernels/loops/row_values.inl"

#include "kernels/loops/scores.inl"

#include "kernels/loops/hadamard.inl"

#include "kernels/loops/transposed.inl"

#if defined(MIXEDKV_BF16)
#include "kernels/loops/bf16.inl"
#endif

#include "kernels/loops/tile_products.inl"

#include "kernels/loops/tile_keys.inl"

#include "kernels/loops/tile_values.inl"

#include "kernels/loops/tile_unpack.inl"

#include "kernels/loops/tile_pack.inl"

#include "kernels/formats/rows.inl"

#include "kernels/formats/q4_0.inl"

#include "kernels/formats/q4_0_tiles.inl"

#include "kernels/formats/q8_0.inl"

#include "kernels/formats/q8_0_tiles.inl"

#include "kernels/formats/iq4_nl.inl"

#include "kernels/formats/iq4_nl_tiles.inl"

#include "kernels/loops/level_search.inl"

#include "kernels/formats/nl4.inl"

#include "kernels/formats/nl4_tiles.inl"

#include "kernels/formats/nl3.inl"

#include "kernels/formats/nl3_tiles.inl"

#include "kernels/formats/fitted_scales.inl"

// --- the table ---------------------------------------------------------------------------------

// A vector instruction set's kernels, made of what its page has included so far. A page defines
// MIXEDKV_ISA, its name as an identifier, and exports one constant of that name (isa_tables.h); it
// may put kernels of its own in place of some of these.

#define MIXEDKV_TABLE_NAME(isa) kernels_##isa
#define MIXEDKV_TABLE(isa) MIXEDKV_TABLE_NAME(isa)
#define MIXEDKV_TEXT_OF(isa) #isa
#define MIXEDKV_TEXT(isa) MIXEDKV_TEXT_OF(isa)

constexpr TileKernels tiles_q4_0 = fitted_tiles_q4_0();
constexpr TileKernels tiles_q8_0 = make_tiles_q8_0();
constexpr TileKernels tiles_iq4_nl = fitted_tiles_iq4_nl();
constexpr TileKernels tiles_nl4 = always_fitted(make_tiles_nl4());
constexpr TileKernels tiles_nl3 = always_fitted(make_tiles_nl3());

constexpr Kernels make_kernels() {
  Kernels k{};
  k.name = MIXEDKV_TEXT(MIXEDKV_ISA);
  set_rows(k, Format::f32, rows_f32());
  set_rows(k, Format::f16, rows_f16());
  set_rows(k, Format::q4_0, fitted_rows_q4_0());
  set_rows(k, Format::q8_0, rows_q8_0());
  set_rows(k, Format::bf16, rows_bf16());
  set_rows(k, Format::iq4_nl, fitted_rows_iq4_nl());
  set_rows(k, Format::nl4, always_fitted(rows_nl4()));
  set_rows(k, Format::nl3, always_fitted(rows_nl3()));
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
#if defined(MIXEDKV_BF16)
  k.bf16 = &bf16_kernels;
#endif
  return k;
}
