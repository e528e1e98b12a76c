// A tile: up to kTileRows query rows of one kv head, that is (query, head of the group) pairs in
// that order, and their states. It walks over runs of keys; every load and unpacking of a key or
// value serves all rows of the tile.
#pragma once

#include "attention/state.h"
#include "formats/token_tile.h"
#include "kernels/kernels.h"
#include "mixedkv/attention.h"

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace mixedkv {

constexpr int kTileRows = 128;
/// From this many rows on, a run of keys or values is unpacked once to f32 for all of them, keys
/// side by side; below, the kernels unpack in registers.
constexpr int kUnpackRows = 9;
/// Keys whose scores are held at a time: with the scores of a decode step's rows, and with an
/// unpacked run of keys for a full tile, they stay in the first and second cache.
constexpr int kChunkKeys = 256;
constexpr int kChunkKeysFullTile = 128;
/// Scores lie this much further apart: a chunk of packed keys may start and end within a tile.
constexpr int kScoresPad = 2 * kTileTokens;
constexpr int kMaxTiles = kChunkKeys / kTileTokens + 1;
/// Tiles listed beyond a chunk's own, so that kernels can ask for them ahead of their turn.
constexpr int kTilesAhead = kChunkKeys / kTileTokens;

/// A buffer that grows and never shrinks, so that a steady state allocates nothing.
template <typename T> class Buffer {
public:
  Buffer() = default;
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  ~Buffer() { ::operator delete[](data_, std::align_val_t(64)); }
  /// At least size elements, contents undefined.
  T *get(std::size_t size) {
    if (size > capacity_) {
      const std::size_t wanted = size + size / 2;
      void *fresh = ::operator new[](wanted * sizeof(T), std::align_val_t(64));
      ::operator delete[](data_, std::align_val_t(64));
      data_ = static_cast<T *>(fresh);
      capacity_ = wanted;
    }
    return data_;
  }

private:
  T *data_ = nullptr;
  std::size_t capacity_ = 0;
};

class QueryTile {
public:
  /// Rows [row_begin, row_begin + num_rows) of kv head kv_head, row = query * group + head of the
  /// group. Loads the queries, scaled by sm_scale; states start empty. scratch: scratch_floats.
  QueryTile(const Kernels &kernels, float *scratch, const AttentionParams &params,
            const AttentionProblem &problem, int kv_head, std::int64_t row_begin, int num_rows);

  /// Floats of scratch that a tile of these widths takes at most.
  static std::size_t scratch_floats(const AttentionParams &params);
  static std::size_t bf16_scratch_floats(std::size_t head_dim, std::size_t head_dim_v);

  void load_state(const StateView &state);
  /// Writes back the rows that have seen a key; the others stay as they were, bytes and all.
  void store_state(const StateView &state) const;
  /// Continues the states over keys [begin, end) of a segment whose first key has index
  /// mask_begin in the mask.
  void attend(const KeySegment &segment, std::int64_t begin, std::int64_t end,
              std::int64_t mask_begin);
  /// A partial state in transit: (M, S) pairs, then accumulators.
  void store_partial(float *partial) const;
  void merge_partial(const float *partial);
  static std::size_t partial_floats(int num_rows, int head_dim_v) {
    return static_cast<std::size_t>(num_rows) * (2 + static_cast<std::size_t>(head_dim_v));
  }
  void finalize(const float *sinks, const OutputView &out) const;

private:
  enum class Visible { none, some, all };
  /// What the rows of the tile see of a run of keys, by position.
  struct Sight {
    Visible visible;
    bool consecutive;   ///< positions ascend by one
    std::int64_t first; ///< the smallest
  };

  std::int64_t query(int row) const { return (row_begin_ + row) / group_; }
  int head(int row) const {
    return kv_head_ * group_ + static_cast<int>((row_begin_ + row) % group_);
  }
  float *acc(int row) const { return acc_ + static_cast<std::size_t>(row) * head_dim_v_; }

  /// A run of keys whose scores are held at a time, and where they are held.
  struct Chunk {
    const KeySegment &segment;
    std::int64_t begin;
    int n;
    int num_tiles;  ///< that packed keys or values lie in
    int lead;       ///< keys of the first tile before the chunk's first
    bool listed;    ///< packed tiles are those in tiles_, not one after the other
    bool scattered; ///< keys have gaps between them there: key j is at slots_[j]
    float *x;       ///< scores of key 0; rows are ld_ apart
  };

  Chunk make_chunk(const KeySegment &segment, std::int64_t begin, std::int64_t end);
  int list_tiles(const std::int32_t *cells, int n, int *num_tiles);
  void list_tiles_ahead(const std::int32_t *cell, const std::int32_t *end, int count);
  Rows tiles_of(const Chunk &chunk, const void *base, std::ptrdiff_t head_stride,
                std::ptrdiff_t tile_stride) const;
  void attend_chunk(const Chunk &chunk, std::int64_t mask_begin);
  void compute_scores(const Chunk &chunk);
  void gather_scores(const Chunk &chunk);
  void weigh_values(const Chunk &chunk, bool some_hidden);
  void weigh_packed_values(const Chunk &chunk, bool some_hidden);
  void weigh_unpacked(float *values, int n, const float *weights, bool some_hidden);
  Sight look(const KeySegment &segment, std::int64_t begin, int n) const;
  void hide_by_position(const KeySegment &segment, std::int64_t begin, int n, int row,
                        float *x) const;
  bool apply_mask(int row, std::int64_t mask_key, int n, float *x);
  void apply_alibi(const KeySegment &segment, std::int64_t begin, int n, int row, float *x) const;
  bool raise_maximum(int row, const float *x, int n);
  void softmax_row(int row, float *x, int n);

  // Arithmetic in bf16: tile_bf16.cpp
  void take_bf16(float *&scratch);
  void compute_scores_bf16(const Chunk &chunk);
  void softmax_row_bf16(const Chunk &chunk, int row, int from, int to);
  void weigh_values_bf16(const Chunk &chunk, bool some_hidden);
  void take_out_not_finite(int num_keys, std::size_t ld_panel);

  const Kernels &kernels_;
  const AttentionParams &params_;
  const AttentionProblem &problem_;
  int kv_head_;
  int group_;
  std::int64_t row_begin_;
  int num_rows_;
  int chunk_keys_ = 0;
  bool positional_;
  std::size_t head_dim_;
  std::size_t head_dim_v_;
  RowState states_[kTileRows];
  std::int64_t pos_[kTileRows];
  std::int64_t pos_min_;
  std::int64_t pos_max_;
  float *q_;        ///< [num_rows, head_dim], scaled
  float *acc_;      ///< [num_rows, head_dim_v]
  std::size_t ld_;  ///< of scores_ and gathered_
  float *scores_;   ///< [num_rows, ld]
  float *gathered_; ///< [num_rows, ld]: scores of scattered keys, in their order
  float *bias_;     ///< [chunk_keys]
  float *prepared_; ///< queries as qk_packed takes them; filled when first needed
  float *keys_;     ///< tiles of keys side by side
  float *values_;   ///< [chunk_keys + kScoresPad, head_dim_v]: a run of values, unpacked
  const TileKernels *prepared_for_ = nullptr; ///< whose form prepared_ has
  const Bf16Kernels *bf16_ = nullptr;         ///< where products of this tile are in bf16
  std::size_t ld_q_bf16_ = 0;
  bf16_t *q_bf16_ = nullptr;       ///< [num_rows, ld_q_bf16]
  bf16_t *weights_bf16_ = nullptr; ///< [num_rows, ld], of values as these lie in their panels
  bf16_t *key_panels_ = nullptr;
  bf16_t *value_panels_ = nullptr;
  std::int32_t tiles_[kMaxTiles + kTilesAhead];
  int num_tiles_ahead_ = 0;
  std::uint16_t slots_[kChunkKeys];
};

} // namespace mixedkv
