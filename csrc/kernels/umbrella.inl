// Everything that is written once in the vocabulary of common.h, for an instruction set's page to
// include after its words.

#include "kernels/loops/convert.inl"

#include "kernels/formats/q4_0_quantize.inl"

#include "kernels/loops/rows.inl"

#include "kernels/loops/scores.inl"

#include "kernels/loops/tile_keys.inl"

#include "kernels/loops/tile_values.inl"

#include "kernels/loops/transposed.inl"

#include "kernels/formats/q4_0_pack.inl"
