// What every vector vocabulary and every loop needs: C headers only, and a way to insist on
// inlining. Each ISA's file includes, inside namespace mixedkv and an anonymous namespace of its
// own, first its simd_<isa>.h and then the *.inl files that are written in that vocabulary:
//
//   kLanes                  floats in a vector, f32v; kLanes <= 16 and a power of two
//   load, load_n            kLanes (or the first n < kLanes, the rest a given value) f32, f16 or
//   bf16;
//                           load of signed bytes too
//   store, store_n          the same way back, f16 rounded to nearest even
//   set1_half(h)            an f16 in every lane
//   zero set1 add sub mul div fma(a, b, c) = a * b + c, rint, scale_by_power(x, n) = x * 2^n
//   max_or_second(a, b)     the larger; b where either is NaN. min_or_second likewise
//   max_bits(a, b)          the larger of numbers >= 0, infinity above them, NaN above all
//   select_below(x, y, a, b)  x < y ? a : b, lane by lane; b where x or y is NaN
//   any_below(x, y)         whether x < y in any lane
//   copy_sign(a, s)         |a| with the sign of s;  abs_of(x)
//   sum_lanes, max_lanes    one float from a vector
//   sum4(out, a, b, c, d)   out[0..3] = the sums of the lanes of each, added up in the same order
//                           for every position
//   any_not_finite(x), any_not_finite_16(p)   of a vector of f32, of 16 f16 in memory
//   Q4, q4_open, q4_vector  a Q4_0 block as values: vector V holds elements V * kLanes on, but for
//                           the sign of zeros, and NaN where d is infinite;
//                           q4_vector_exact: (q - 8) * d in all bits
//   Levels, open_levels(levels, d, bytes), level<V>   32 nibbles in a block's order (as Q4_0's), a
//                           register (b16), each of which stands for one of sixteen levels, signed
//                           bytes, times d
//   swap_lanes<H>(x)        lane i becomes lane i ^ H, H a power of two below kLanes
//   transpose(x)            of kLanes vectors: lane j of x[i] becomes lane i of x[j]
//   find_extremes, find_group_extremes (of kQuantBlocks blocks, a multiple of kLanes), store_q4,
//   to_half   the parts of quantisation that have no common form
//   kRows                   most rows of a micro-tile
//   key_tile(R, q4)         keys beside R rows in qk, as registers allow; q4: to be unpacked
//   kOpenKeys               keys whose Q4_0 blocks are unpacked together in qk
//   value_tile(R, q4)       vectors of V beside R rows in pv: a power of two
//
// For tile_keys.inl and transposed.inl, integers_<isa>.h adds these:
//
//   i32v                    a vector of kLanes 32-bit numbers, seen as bytes or halves too
//   load_i32 set1_i32 zero_i32 add_i32 sub_i32 and_i32 xor_i32
//   shift_left<N>, shift_right_signed<N>, to_f32, sum_lanes, bits_as_f32, f32_as_bits
//   low_nibbles, high_nibbles   of every byte, as a byte
//   load_table(p), look_up(table, x)   sixteen bytes; each byte of x, 0 to 15, becomes one of them
//   Dot, dot_from(start), dot(acc, u, s), dot_total(acc, start)   acc gains, lane by lane, the
//                           four products of bytes 0 to 15 in u and signed bytes in s, eight times
//                           at most from dot_from to dot_total, which take the same start
//   kByteDots               whether u may hold any bytes, any number of times, instead
//   kSignedDots             whether they are signed then
//   high_bytes(x)           of every half, as a half
//   madd16(acc, a, b)       acc gains, lane by lane, the two products of signed halves
//   to_i32(x)               rounded to nearest even
//   h16v, zero_half_bits(), max_magnitude_bits(a, p)   kLanes magnitudes of f16, as bits; those of
//                           a or of the f16 at p, the larger, infinity and NaN above all
//   any_bits_above(a, limit)   whether any is above 0 <= limit < 2^15
//   store_halves, store_bytes(p, x)   kLanes halves or bytes, saturated
//   store_i32               back to memory
//   merge_i32(mask, a, b)   bits of a where mask has them, of b elsewhere
//   set1_halves(x), scale_halves(x, m)   halves; (x * m + 2^14) >> 15 of each
//   narrow(a, b)            halves as bytes, saturated; widen_low, widen_high(narrow(a, b)) are
//                           halves of a and of b again
//   count_above(n, x, y)    bytes n + (x > y), x and y signed
//   prefetch(p)             a hint; p may lie anywhere
//   kPackedVectors          vectors of tokens that qk_packed works on at a time
//   kValueVectors           vectors of dims that pv_packed works on at a time
//   kWeightBlocks           blocks whose weights pv_packed makes together: a power of two
//
// For q4_0_tiles.inl, bytes_<architecture>.h adds these:
//
//   b16                     sixteen bytes;  load_b16 store_b16, set1_b16, set1_words_b16 (of one
//                           byte, of one 32-bit word), b16_of (of two 64-bit words), and_b16
//                           or_b16 xor_b16
//   low_nibbles_of(a, b)    bytes of the low nibbles of a (low) and b (high); high_nibbles_of: of
//                           the high ones
//   interleave_b16(x)       of four: the i-th word of all is made of the i-th bytes of x[0] to x[3]
//   transpose_words_b16(x)  of four: word j of x[i] becomes word i of x[j]
#pragma once

#include "formats/byte_tile.h"
#include "formats/levels.h"
#include "formats/nibble_tile.h"
#include "formats/nl3_tile.h"
#include "kernels/isa_tables.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(_MSC_VER) && !defined(__clang__)
#define MIXEDKV_INLINE __forceinline
#define MIXEDKV_NOINLINE __declspec(noinline)
#define MIXEDKV_RARE MIXEDKV_NOINLINE
#else
// nothrow: or else the callers, being noexcept, bring in the (weak) personality of C++ exceptions.
#define MIXEDKV_INLINE inline __attribute__((always_inline, nothrow))
/// Called from several places, and large.
#define MIXEDKV_NOINLINE __attribute__((noinline))
/// Apart from the loop that it is called from, which keeps its registers.
#define MIXEDKV_RARE __attribute__((noinline, cold))
#endif
