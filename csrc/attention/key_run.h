// A run of keys: those whose scores are held at a time, as many as a tile takes of a segment at
// once, and where their keys and values lie.
#pragma once

#include "attention/sizes.h"
#include "formats/rows.h"
#include "mixedkv/attention.h"

#include <cstdint>

namespace mixedkv {

inline const void *row_at(const Rows &rows, int j) {
  return static_cast<const char *>(rows.base) +
         rows.stride * (rows.index != nullptr ? rows.index[j] : j);
}

/// The rows from row j on.
inline Rows rows_from(const Rows &rows, int j) {
  if (rows.index != nullptr) {
    return {rows.base, rows.stride, rows.index + j};
  }
  return {static_cast<const char *>(rows.base) + rows.stride * j, rows.stride, nullptr};
}

/// What rows or tiles of pages are counted in, in bytes: both strides are multiples of it.
std::ptrdiff_t page_unit(std::ptrdiff_t page_stride, std::ptrdiff_t row_stride);

class KeyRun {
public:
  /// Runs of at most most_keys <= kChunkKeys keys of a kv head.
  KeyRun(int kv_head, int most_keys) : kv_head_(kv_head), most_keys_(most_keys) {}
  KeyRun(const KeyRun &) = delete; // keys() and values() point into it
  KeyRun &operator=(const KeyRun &) = delete;

  /// Becomes the run of the keys of a segment from begin on and before end > begin; size() says how
  /// many they are. Where it is cut follows from key numbers, and where keys are scattered over
  /// tiles, from these. The segment outlives the run's use.
  void take(const KeySegment &segment, std::int64_t begin, std::int64_t end);

  const KeySegment &segment() const { return *segment_; }
  std::int64_t begin() const { return begin_; }
  int size() const { return size_; }

  /// Rows of the keys (values) in the layout of rows, else the token tiles that they lie in.
  const Rows &keys() const { return keys_; }
  const Rows &values() const { return values_; }

  // --- where keys or values are packed; 0 and false elsewhere ------------------------------------

  /// Tiles that they lie in.
  int num_tiles() const { return num_tiles_; }
  /// Tokens of all these.
  int num_tokens() const { return num_tiles_ * kTileTokens; }
  /// Tokens of the first tile before the first key.
  int lead() const { return lead_; }
  /// Whether there are gaps between keys in their tiles; else key j is token lead() + j.
  bool scattered() const { return scattered_; }
  /// The token that key j of a scattered run is.
  int slot(int j) const { return slots_[j]; }

private:
  enum : int {
    kMaxTiles = kChunkKeys / kTileTokens + 1,
    /// Tiles listed beyond a run's own, so that kernels can ask for them ahead of their turn.
    kTilesAhead = kChunkKeys / kTileTokens,
  };

  /// Where keys, or values, lie.
  struct Place {
    const char *data; ///< of the run's head
    Layout layout;
    std::ptrdiff_t row_stride;
    std::ptrdiff_t page_stride;
  };

  void find_tiles(std::int64_t end);
  void list_tiles(const std::int32_t *cells);
  int list_tiles_ahead(const std::int32_t *cell, const std::int32_t *end);
  Rows find(const Place &place) const;
  Rows find_in_pages(const Place &place, std::int32_t *list) const;

  int kv_head_;
  int most_keys_;
  const KeySegment *segment_ = nullptr;
  std::int64_t begin_ = 0;
  int size_ = 0;
  Rows keys_{};
  Rows values_{};
  int num_tiles_ = 0;
  int num_tiles_ahead_ = 0;
  int lead_ = 0;
  bool listed_ = false; ///< tiles are those in tiles_, not one after the other
  bool scattered_ = false;
  std::int32_t tiles_[kMaxTiles + kTilesAhead]; ///< by index: of keys and values alike
  std::int32_t k_rows_[kChunkKeys];             ///< in pages: rows, or tiles, of keys ...
  std::int32_t v_rows_[kChunkKeys];             ///< ... and of values
  std::uint16_t slots_[kChunkKeys];
};

} // namespace mixedkv
