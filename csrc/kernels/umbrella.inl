// Everything that is written once in the vocabulary of common.h, for an instruction set's page to
// include after its words: loops that know no format, then the formats, then the table.

#include "kernels/loops/convert.inl"

#include "kernels/loops/blocks.inl"

#include "kernels/loops/rows.inl"

#include "kernels/loops/row_values.inl"

#include "kernels/loops/scores.inl"

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

#include "kernels/loops/table.inl"
