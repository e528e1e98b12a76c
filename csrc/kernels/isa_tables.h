// The one symbol that each instruction set's file exports. Which of these exist in a build is
// CMake's table of ISAs to say; dispatch.cpp names only those.
#pragma once

#include "kernels/kernels.h"

namespace mixedkv {

constexpr void set_rows(Kernels &kernels, Format format, const RowKernels &rows) {
  kernels.rows[static_cast<int>(format)] = rows;
}
constexpr void set_tiles(Kernels &kernels, Format format, const TileKernels *tiles) {
  kernels.tiles[static_cast<int>(format)] = tiles;
}

/// Of a format whose scales are chosen by least squared error whoever asks.
constexpr RowKernels always_fitted(RowKernels rows) {
  rows.fit_f32 = rows.from_f32;
  rows.fit_f16 = rows.from_f16;
  return rows;
}
constexpr TileKernels always_fitted(TileKernels tiles) {
  tiles.fit_keys_f32 = tiles.pack_keys_f32;
  tiles.fit_keys_f16 = tiles.pack_keys_f16;
  tiles.fit_values_f32 = tiles.pack_values_f32;
  tiles.fit_values_f16 = tiles.pack_values_f16;
  return tiles;
}

extern const Kernels kernels_scalar;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx2_vnni;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_vnni;
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_neon;
extern const Kernels kernels_neon_dotprod;
extern const Kernels kernels_neon_i8mm;
extern const Kernels kernels_neon_bf16;

} // namespace mixedkv
