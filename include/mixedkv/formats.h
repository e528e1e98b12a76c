// How the values of a row may be stored: one table that everything else asks. A format says what a
// row's bytes mean; a layout says how rows lie (one by one, or in tiles of several tokens).
// Nothing here allocates, throws, or has external linkage, so that files compiled for a special
// instruction set may include it without leaking code into other machines' paths.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mixedkv {

/// An IEEE 754 half as its 16 bits.
using f16_t = std::uint16_t;

/// The upper half of an f32.
struct bf16_t {
  std::uint16_t bits;
};

/// Numbers are part of the C ABI (mixedkv/c.h): new ones go to the end.
enum class Format : std::uint8_t { f32, f16, q4_0, q8_0, bf16, iq4_nl, nl4, nl3 };
enum : int { kNumFormats = 8 };

/// rows: one after the other, as ggml, numpy and torch have them. tiles: the same bits, of several
/// tokens together, as attention reads them fastest (inside caches only; formats/token_tile.h).
enum class Layout : std::uint8_t { rows, tiles };

/// What a row's bytes mean.
struct FormatInfo {
  const char *name;
  int block_values; ///< values that share a block; 1 where each stands alone
  int block_bytes;
  int ggml_type; ///< ggml's number of the same bytes, -1 where it has none
  /// Finite values of this magnitude and more don't stay finite in a row (they round to infinity,
  /// or their block's scale does); 0: all do.
  double overflow;
  /// A magnitude may grow by so much of itself, at most, when it is stored.
  double growth;
  /// Whether a block's scale can be chosen by least squared error (docs/formats.md); nl4's and
  /// nl3's always are.
  bool fits;
  /// As `growth`, where scales are: the largest magnitude may go to the level above it, and by some
  /// more where most other values lie above theirs.
  constexpr double growth_of(bool fit_scales) const {
    return fit_scales && fits && growth < 0.5 ? 0.5 : growth;
  }

  /// Whether values are stored as they are, each on its own, in a type of numpy's or torch's.
  constexpr bool plain() const { return block_values == 1; }
  /// Whether a row may hold n values: whole blocks.
  constexpr bool holds(std::int64_t n) const { return n % block_values == 0; }
  /// Whether a finite value of that magnitude stays finite in a row.
  constexpr bool keeps_finite(double magnitude) const {
    return overflow == 0.0 || magnitude < overflow;
  }
};

/// From here on an f16 rounds to infinity: half a step above the largest, 65504.
constexpr double kF16Overflow = 65520.0;
/// Likewise a bf16: half a step above its largest, 0x7f7f.
constexpr double kBf16Overflow = 0x1.ffp127;

/// By Format.
// clang-format off
constexpr FormatInfo kFormats[kNumFormats] = {
    {"f32", 1, 4, 0, 0.0, 0.0, false},
    {"f16", 1, 2, 1, kF16Overflow, 0x1p-11, false},
    {"q4_0", 32, 18, 2, 8 * kF16Overflow, 0x1p-10, true},
    {"q8_0", 32, 34, 8, 127 * kF16Overflow, 0x1p-10, false},
    {"bf16", 1, 2, 30, kBf16Overflow, 0x1p-8, false},
    {"iq4_nl", 32, 18, 20, 113 * kF16Overflow, 0x1p-3, true},
    {"nl4", 64, 34, -1, 64 * kF16Overflow, 1.0, true},
    {"nl3", 32, 14, -1, 32 * kF16Overflow, 2.0, true},
};
// clang-format on

constexpr const FormatInfo &format_info(Format format) {
  return kFormats[static_cast<int>(format)];
}
static constexpr const char *format_name(Format format) { return format_info(format).name; }

/// Bytes of a row of n values, whole blocks of the format.
static constexpr std::size_t row_bytes(Format format, std::size_t n) {
  const FormatInfo &info = format_info(format);
  return n / static_cast<std::size_t>(info.block_values) *
         static_cast<std::size_t>(info.block_bytes);
}

// --- blocks --------------------------------------------------------------------------------------
// Each begins with a scale in f16; its values are the scale times levels of eight bits.

/// Values in one Q4_0 block.
enum : int { QK4_0 = 32 };

/// ggml's Q4_0 block: element j is the low nibble of qs[j], element j + 16 the high one;
/// a value is (nibble - 8) * d.
struct block_q4_0 {
  f16_t d;
  std::uint8_t qs[QK4_0 / 2];
};
static_assert(sizeof(block_q4_0) == 18, "Q4_0 blocks are 18 bytes, without padding");
static_assert(format_info(Format::q4_0).block_bytes == sizeof(block_q4_0), "one truth");

/// Values in one Q8_0 block.
enum : int { QK8_0 = 32 };

/// ggml's Q8_0 block: a value is qs[j] * d.
struct block_q8_0 {
  f16_t d;
  std::int8_t qs[QK8_0];
};
static_assert(format_info(Format::q8_0).block_bytes == sizeof(block_q8_0), "one truth");

/// Values in one IQ4_NL block.
enum : int { QK4_NL = 32 };

/// ggml's IQ4_NL block: nibbles as in Q4_0; a value is d times one of sixteen levels that lie
/// closer around zero than far from it (kernels/formats/iq4_nl.inl).
struct block_iq4_nl {
  f16_t d;
  std::uint8_t qs[QK4_NL / 2];
};
static_assert(format_info(Format::iq4_nl).block_bytes == sizeof(block_iq4_nl), "one truth");

/// Values in one NL4 block.
enum : int { QNL4 = 64 };

/// mixedkv's own: element j is the low nibble of qs[j], element j + 16 the high one, for j < 16;
/// the second 32 lie likewise in qs[16] on. A value is d times one of sixteen levels
/// (docs/semantics.md), d of either sign.
struct block_nl4 {
  f16_t d;
  std::uint8_t qs[QNL4 / 2];
};
static_assert(format_info(Format::nl4).block_bytes == sizeof(block_nl4), "one truth");

/// Values in one NL3 block.
enum : int { QNL3 = 32 };

/// mixedkv's own: numbers of three bits, those of elements j and j + 16 in the lower bits of the
/// nibbles of qs[j], for j < 12; bit k of elements 12 + j and 28 + j, for j < 4, is the top bit of
/// the low and of the high nibble of qs[4 k + j]. A value is d times one of eight levels
/// (docs/semantics.md), d of either sign.
struct block_nl3 {
  f16_t d;
  std::uint8_t qs[12];
};
static_assert(format_info(Format::nl3).block_bytes == sizeof(block_nl3), "one truth");

} // namespace mixedkv
