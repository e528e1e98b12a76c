// How much attention takes at a time, and where a worker's scratch memory goes.
#pragma once

#include "formats/token_tile.h"

#include <cstddef>

namespace mixedkv {

/// Query rows of a tile, at most.
constexpr int kTileRows = 128;
/// From this many rows on, a run of keys or values is unpacked once to f32 for all of them, keys
/// side by side; below, the kernels unpack in registers.
constexpr int kUnpackRows = 9;
/// Keys whose scores are held at a time: with the scores of a decode step's rows, and with an
/// unpacked run of keys for a full tile, they stay in the first and second cache.
constexpr int kChunkKeys = 256;
constexpr int kChunkKeysFullTile = 128;
/// Scores lie this much further apart: a run of packed keys may start and end within a tile.
constexpr int kScoresPad = 2 * kTileTokens;

/// Hands out a worker's scratch memory part by part, each on cache lines of its own.
class Scratch {
public:
  explicit Scratch(float *begin) : next_(begin) {}

  float *floats(std::size_t n) {
    float *part = next_;
    next_ += line(n);
    return part;
  }
  bf16_t *bf16s(std::size_t n) { return reinterpret_cast<bf16_t *>(floats((n + 1) / 2)); }

  /// Floats that a part of n takes, in whole cache lines.
  static constexpr std::size_t line(std::size_t n) { return (n + 15) / 16 * 16; }
  static constexpr std::size_t line_bf16(std::size_t n) { return line((n + 1) / 2); }

private:
  float *next_;
};

} // namespace mixedkv
