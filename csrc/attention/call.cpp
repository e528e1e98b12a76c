// How a call is cut into units of work. Query rows of a kv head form tiles. Where a call has few of
// them (a decode step, a short prefill of one head), keys are cut into pieces besides, each
// attended into a partial state of its own; whoever finishes a tile's last piece merges them, in
// order. Cuts and order follow from the shapes alone, so the result has the same bits for any
// number of threads.
#include "attention/call.h"

#include "attention/check_keys.h"
#include "attention/compute_type.h"
#include "attention/query_tile.h"
#include "attention/state.h"
#include "kernels/dispatch.h"
#include "runtime/buffer.h"
#include "runtime/parallel.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>

namespace mixedkv {
namespace {

/// Pieces are this long at least, so that a unit outweighs its partial state and its hand-out ...
constexpr std::int64_t kMinPieceKeys = 256;
/// ... and as few as make this many units of a call, enough for many threads to share evenly.
constexpr std::int64_t kUnits = 64;
/// Calls below this many multiply-adds are not worth waking a worker.
constexpr std::int64_t kSerialWork = 1 << 18;

struct Piece {
  int segment;
  std::int64_t begin;
  std::int64_t end;
};

struct ProblemPlan {
  std::int64_t unit_begin;    ///< first unit of the problem
  std::int64_t num_tiles;     ///< tiles a kv head
  std::int64_t num_pieces;    ///< of each tile; 1 where keys are not cut
  std::int64_t piece_begin;   ///< where they are: into the list of pieces
  std::int64_t counter_begin; ///< unfinished pieces, one counter a tile of a kv head
  std::size_t partial_begin;  ///< floats
  std::size_t partial_stride; ///< floats of a piece's partial state
};

/// A worker's tile. Its next unit is mostly another piece of the same one, whose queries are
/// loaded, changed and prepared already.
class alignas(64) WorkerTile {
public:
  /// Before a call: what the last one's tile refers to may be gone.
  void forget() { tile_.reset(); }

  /// The tile of these rows (as of QueryTile), with empty states.
  QueryTile &take(const Kernels &kernels, float *scratch, const AttentionParams &params,
                  const AttentionProblem &problem, int kv_head, std::int64_t row_begin,
                  int num_rows) {
    if (tile_ && problem_ == &problem && kv_head_ == kv_head && row_begin_ == row_begin) {
      tile_->clear();
    } else {
      tile_.emplace(kernels, scratch, params, problem, kv_head, row_begin, num_rows);
      problem_ = &problem;
      kv_head_ = kv_head;
      row_begin_ = row_begin;
    }
    return *tile_;
  }

private:
  std::optional<QueryTile> tile_;
  const AttentionProblem *problem_ = nullptr;
  int kv_head_ = 0;
  std::int64_t row_begin_ = 0;
};

/// What a calling thread's calls need, the scratch of all their workers included; it grows in a
/// call's plan, before anything is computed, and is kept from call to call.
struct Workspace {
  Buffer<ProblemPlan> plans;
  Buffer<Piece> pieces;
  Buffer<float> partials;
  std::unique_ptr<std::atomic<std::int64_t>[]> counters;
  std::int64_t num_counters = 0;
  Buffer<float> scratch;
  std::unique_ptr<WorkerTile[]> tiles;
  int num_tiles = 0;
};

Workspace &workspace() {
  static thread_local Workspace instance;
  return instance;
}

std::int64_t total_keys(const AttentionProblem &problem) {
  std::int64_t n = 0;
  for (int s = 0; s < problem.num_segments; ++s) {
    n += problem.segments[s].len;
  }
  return n;
}

std::int64_t count_pieces(const AttentionProblem &problem, std::int64_t step) {
  std::int64_t n = 0;
  for (int s = 0; s < problem.num_segments; ++s) {
    n += (problem.segments[s].len + step - 1) / step;
  }
  return n;
}

class Call {
public:
  Call(const AttentionProblem *problems, int num_problems, const AttentionParams &params)
      : kernels_(active_kernels()), problems_(problems), num_problems_(num_problems),
        params_(params), group_(params.num_qo_heads / params.num_kv_heads), ws_(workspace()) {}

  void run() {
    const std::int64_t num_units = plan();
    int threads = params_.num_threads > 0 ? params_.num_threads : get_num_threads();
    threads = work_ < kSerialWork ? 1
                                  : static_cast<int>(std::max<std::int64_t>(
                                        1, std::min<std::int64_t>(threads, num_units)));
    scratch_stride_ = QueryTile::scratch_floats(params_);
    scratch_ = ws_.scratch.get(scratch_stride_ * threads);
    if (threads > ws_.num_tiles) {
      ws_.tiles.reset(new WorkerTile[static_cast<std::size_t>(threads)]);
      ws_.num_tiles = threads;
    }
    for (int worker = 0; worker < threads; ++worker) {
      ws_.tiles[static_cast<std::size_t>(worker)].forget();
    }
    parallel_for(num_units, threads,
                 [this](std::int64_t unit, int worker) { run_unit(unit, worker); });
  }

private:
  std::int64_t tiles_of(const AttentionProblem &problem) const {
    return (problem.q.len * group_ + kTileRows - 1) / kTileRows;
  }

  /// Most keys of a piece: so many that the problems' tiles and their keys make about kUnits units.
  /// By keys, not by problems: one long sequence among short ones is cut all the same.
  std::int64_t piece_keys(const AttentionProblem *problems, int num_problems) const {
    std::int64_t visits = 0;
    for (int i = 0; i < num_problems; ++i) {
      visits += tiles_of(problems[i]) * params_.num_kv_heads * total_keys(problems[i]);
    }
    const std::int64_t even = (visits + kUnits - 1) / kUnits;
    return std::max(kMinPieceKeys, (even + kChunkKeys - 1) / kChunkKeys * kChunkKeys);
  }

  /// Cuts all problems and returns the number of units.
  std::int64_t plan() {
    plans_ = ws_.plans.get(num_problems_);
    const std::int64_t common_step = params_.cut_alone ? 0 : piece_keys(problems_, num_problems_);
    const auto step_of = [&](const AttentionProblem &problem) {
      return params_.cut_alone ? piece_keys(&problem, 1) : common_step;
    };
    std::int64_t num_units = 0;
    std::int64_t num_pieces = 0;
    std::int64_t num_counters = 0;
    std::size_t num_floats = 0;
    for (int i = 0; i < num_problems_; ++i) {
      const AttentionProblem &problem = problems_[i];
      const std::int64_t rows = problem.q.len * group_;
      const std::int64_t count = count_pieces(problem, step_of(problem));
      ProblemPlan &p = plans_[i];
      p = {num_units, tiles_of(problem), 1, num_pieces, num_counters, num_floats, 0};
      const std::int64_t tiles = p.num_tiles * params_.num_kv_heads;
      if (count > 1) {
        p.num_pieces = count;
        p.partial_stride = TileStates::partial_floats(
            static_cast<int>(std::min<std::int64_t>(rows, kTileRows)), params_.head_dim_v);
        num_pieces += count;
        num_counters += tiles;
        num_floats += p.partial_stride * static_cast<std::size_t>(count * tiles);
      }
      num_units += tiles * p.num_pieces;
      work_ += rows * params_.num_kv_heads * total_keys(problem) *
               (params_.head_dim + params_.head_dim_v);
    }
    partials_ = ws_.partials.get(num_floats);
    pieces_ = ws_.pieces.get(static_cast<std::size_t>(num_pieces));
    if (num_counters > ws_.num_counters) {
      ws_.counters.reset(new std::atomic<std::int64_t>[static_cast<std::size_t>(num_counters)]);
      ws_.num_counters = num_counters;
    }
    counters_ = ws_.counters.get();
    for (int i = 0; i < num_problems_; ++i) {
      const ProblemPlan &p = plans_[i];
      if (p.num_pieces > 1) {
        list_pieces(problems_[i], step_of(problems_[i]), pieces_ + p.piece_begin);
        for (std::int64_t t = 0; t < p.num_tiles * params_.num_kv_heads; ++t) {
          counters_[p.counter_begin + t].store(p.num_pieces, std::memory_order_relaxed);
        }
      }
    }
    return num_units;
  }

  static void list_pieces(const AttentionProblem &problem, std::int64_t step, Piece *piece) {
    for (int s = 0; s < problem.num_segments; ++s) {
      const std::int64_t len = problem.segments[s].len;
      for (std::int64_t begin = 0; begin < len; begin += step) {
        *piece++ = {s, begin, std::min(len, begin + step)};
      }
    }
  }

  static std::int64_t mask_begin(const AttentionProblem &problem, int segment) {
    std::int64_t n = 0;
    for (int s = 0; s < segment; ++s) {
      n += problem.segments[s].len;
    }
    return n;
  }

  void run_unit(std::int64_t unit, int worker) {
    float *const scratch = scratch_ + scratch_stride_ * worker;
    const ProblemPlan *plan =
        std::upper_bound(plans_, plans_ + num_problems_, unit,
                         [](std::int64_t u, const ProblemPlan &p) { return u < p.unit_begin; }) -
        1;
    const AttentionProblem &problem = problems_[plan - plans_];
    unit -= plan->unit_begin;
    const std::int64_t piece = unit % plan->num_pieces;
    unit /= plan->num_pieces;
    // The last queries see the most keys: a head's long units first, so that none is left over at
    // the end.
    const std::int64_t tile_index = plan->num_tiles - 1 - unit % plan->num_tiles;
    const int kv_head = static_cast<int>(unit / plan->num_tiles);
    const std::int64_t rows = problem.q.len * group_;
    const std::int64_t row_begin = tile_index * kTileRows;
    const int num_rows = static_cast<int>(std::min<std::int64_t>(kTileRows, rows - row_begin));

    QueryTile &tile = ws_.tiles[static_cast<std::size_t>(worker)].take(
        kernels_, scratch, params_, problem, kv_head, row_begin, num_rows);
    if (plan->num_pieces == 1) {
      attend_all(tile, problem);
      if (!tile.states().all_finite()) {
        tile.start_over_with_care();
        attend_all(tile, problem);
      }
      finish(tile, problem);
      return;
    }
    const std::int64_t index = kv_head * plan->num_tiles + tile_index;
    float *partials = partials_ + plan->partial_begin +
                      static_cast<std::size_t>(index * plan->num_pieces) * plan->partial_stride;
    const Piece &p = pieces_[plan->piece_begin + piece];
    const std::int64_t first = mask_begin(problem, p.segment);
    tile.attend(problem.segments[p.segment], p.begin, p.end, first);
    if (!tile.states().all_finite()) {
      tile.start_over_with_care();
      tile.attend(problem.segments[p.segment], p.begin, p.end, first);
    }
    tile.states().store_partial(partials + static_cast<std::size_t>(piece) * plan->partial_stride);
    if (counters_[plan->counter_begin + index].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      tile.clear();
      merge_pieces(tile, problem, *plan, partials);
    }
  }

  static void attend_all(QueryTile &tile, const AttentionProblem &problem) {
    if (problem.state.ms != nullptr) {
      tile.states().load(problem.state);
    }
    std::int64_t first = 0;
    for (int s = 0; s < problem.num_segments; ++s) {
      tile.attend(problem.segments[s], 0, problem.segments[s].len, first);
      first += problem.segments[s].len;
    }
  }

  void merge_pieces(QueryTile &tile, const AttentionProblem &problem, const ProblemPlan &plan,
                    const float *partials) const {
    if (problem.state.ms != nullptr) {
      tile.states().load(problem.state);
    }
    for (std::int64_t i = 0; i < plan.num_pieces; ++i) {
      tile.states().merge_partial(partials + static_cast<std::size_t>(i) * plan.partial_stride);
    }
    finish(tile, problem);
  }

  void finish(QueryTile &tile, const AttentionProblem &problem) const {
    if (problem.state.ms != nullptr) {
      tile.states().store(problem.state);
    }
    if (problem.out.data != nullptr) {
      tile.states().finalize(params_.sinks, params_.value_transform, problem.out);
    }
  }

  const Kernels &kernels_;
  const AttentionProblem *problems_;
  int num_problems_;
  const AttentionParams &params_;
  int group_;
  Workspace &ws_;
  ProblemPlan *plans_ = nullptr;
  Piece *pieces_ = nullptr;
  float *partials_ = nullptr;
  std::atomic<std::int64_t> *counters_ = nullptr;
  float *scratch_ = nullptr;
  std::size_t scratch_stride_ = 0;
  std::int64_t work_ = 0;
};

} // namespace

void attend_unchecked(const AttentionProblem *problems, int num_problems,
                      const AttentionParams &params) {
  AttentionParams settled = params;
  settled.compute_type = settled_compute_type(problems, num_problems, params);
  Call(problems, num_problems, settled).run();
}

void attend(const AttentionProblem *problems, int num_problems, const AttentionParams &params) {
  for (int i = 0; i < num_problems; ++i) {
    for (int s = 0; s < problems[i].num_segments; ++s) {
      check_keys(problems[i].segments[s]);
    }
  }
  attend_unchecked(problems, num_problems, params);
}

void finalize(const StateView &state, int num_qo_heads, std::int64_t len, int head_dim_v,
              const float *sinks, const OutputView &out) {
  for (int h = 0; h < num_qo_heads; ++h) {
    for (std::int64_t i = 0; i < len; ++i) {
      const std::int64_t row = h * len + i;
      finalize_row({state.ms[2 * row], state.ms[2 * row + 1]}, state.acc + row * head_dim_v,
                   head_dim_v, sinks, out, h, i);
    }
  }
}

void merge(const StateView &a, const StateView &b, std::int64_t num_rows, int head_dim_v) {
  const Kernels &kernels = active_kernels();
  for (std::int64_t row = 0; row < num_rows; ++row) {
    RowState state{a.ms[2 * row], a.ms[2 * row + 1]};
    merge_row(kernels, state, a.acc + row * head_dim_v, {b.ms[2 * row], b.ms[2 * row + 1]},
              b.acc + row * head_dim_v, head_dim_v);
    a.ms[2 * row] = state.m;
    a.ms[2 * row + 1] = state.s;
  }
}

void merge_states(const float *outs, const float *lses, int num_states, std::int64_t num_rows,
                  int head_dim_v, float *out_merged, float *lse_merged) {
  // A normalised pair is the state M = lse, S = 1, acc = out.
  const Kernels &kernels = active_kernels();
  for (std::int64_t row = 0; row < num_rows; ++row) {
    float *acc = out_merged + row * head_dim_v;
    RowState state{kMinusInfinity, 0.0f};
    for (int i = 0; i < num_states; ++i) {
      const std::int64_t from = i * num_rows + row;
      const float lse = lses[from];
      if (lse != std::numeric_limits<float>::infinity()) {
        const float s = std::isnan(lse) ? lse : 1.0f;
        merge_row(kernels, state, acc, {lse, s}, outs + from * head_dim_v, head_dim_v);
      }
    }
    lse_merged[row] = finalize_row(state, acc, head_dim_v, nullptr, acc);
  }
}

} // namespace mixedkv
