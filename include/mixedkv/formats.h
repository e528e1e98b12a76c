// Plain types shared by every room: f16 bits, Q4_0 blocks, row and view descriptions.
// Nothing here allocates, throws, or has external linkage, so that files compiled for a
// special instruction set may include it without leaking code into other machines' paths.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mixedkv {

/// An IEEE 754 half as its 16 bits.
using f16_t = std::uint16_t;

/// Values in one Q4_0 block.
enum : int { QK4_0 = 32 };

/// ggml's Q4_0 block: element j is the low nibble of qs[j], element j + 16 the high one;
/// a value is (nibble - 8) * d.
struct block_q4_0 {
  f16_t d;
  std::uint8_t qs[QK4_0 / 2];
};
static_assert(sizeof(block_q4_0) == 18, "Q4_0 blocks are 18 bytes, without padding");

/// How the values of a key, value or query row are stored.
/// q4_0_packed: the bits of q4_0 in tiles of several tokens (packed.h), inside caches only.
enum class Format : std::uint8_t { f32 = 0, f16 = 1, q4_0 = 2, q4_0_packed = 3 };
/// Types whose rows lie one by one; the first of them hold their values as they are.
enum : int { kNumKvTypes = 3, kNumFloatTypes = 2 };

/// Bytes of a row of n values; for q4_0, n is a multiple of QK4_0.
static constexpr std::size_t row_bytes(Format type, std::size_t n) {
  return type == Format::f32 ? n * 4 : type == Format::f16 ? n * 2 : n / QK4_0 * sizeof(block_q4_0);
}

static constexpr const char *kv_type_name(Format type) {
  return type == Format::f32 ? "f32" : type == Format::f16 ? "f16" : "q4_0";
}

/// Rows of one head. Row j starts at base + stride * (index ? index[j] : j); stride in bytes.
struct Rows {
  const void *base;
  std::ptrdiff_t stride;
  const std::int32_t *index;
  /// So many more entries of index follow those that a call is about: rows that come next, to be
  /// asked for ahead of their turn.
  std::int32_t num_ahead = 0;
};

} // namespace mixedkv
