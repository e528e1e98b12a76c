// Codes of formats that store a value as its block's scale times one of sixteen levels, signed
// bytes in ascending order; eight levels are there twice, so that a nibble's top bit changes
// nothing. And how a byte finds the level nearest to it with look-ups of sixteen entries.
#pragma once

#include <stdint.h>

namespace mixedkv {

/// Of a byte y, whose upper four bits with the top one flipped are h: its level's number is
/// first[h], and one more for each of above[0][h] and above[1][h] that y is above. Of two levels as
/// near, the lower one.
struct LevelTable {
  int8_t levels[16];
  uint8_t bytes[2][16]; ///< levels, and 128 more
  uint8_t first[16];
  uint8_t above[2][16];

  constexpr LevelTable(const int8_t *of, int count) : levels(), bytes(), first(), above() {
    for (int i = 0; i < 16; ++i) {
      levels[i] = of[i % count];
      bytes[0][i] = static_cast<uint8_t>(levels[i]);
      bytes[1][i] = static_cast<uint8_t>(levels[i] + 128);
    }
    for (int h = 0; h < 16; ++h) {
      const int low = 16 * h - 128;
      int number = 0, found = 0;
      above[0][h] = above[1][h] = 127; // no byte is above it
      for (int i = 0; i + 1 < count; ++i) {
        // Twice what lies half way; a byte is above where it is above its half, rounded down.
        const int middle = (of[i] + of[i + 1] + 256) / 2 - 128;
        if (middle < low)
          ++number;
        else if (middle < low + 15)
          above[found++][h] = static_cast<uint8_t>(middle); // a third would not compile
      }
      first[h] = static_cast<uint8_t>(number);
    }
  }
};

/// Q4_0's, sixteen to a step of its codes.
constexpr int8_t kLevelsQ4_0[16] = {-128, -112, -96, -80, -64, -48, -32, -16,
                                    0,    16,   32,  48,  64,  80,  96,  112};
constexpr int8_t kLevelsNl4[16] = {-111, -88, -70, -55, -41, -28, -16, -5,
                                   6,    17,  29,  42,  56,  73,  94,  127};
constexpr int8_t kLevelsNl3[8] = {-104, -65, -34, -8, 17, 44, 76, 127};

/// A fitted block takes the place of ggml's where its squared error, this many times over, is below
/// that of ggml's: sums of 32 squares in f32 are off by less than half as much.
constexpr float kFitMargin = 1.0f + 1.0f / 131072.0f;
/// And where that of ggml's is no less than this: far below, squares lose their digits.
constexpr float kFitLeastError = 1e-30f;

} // namespace mixedkv
