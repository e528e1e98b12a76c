// Which keys the tokens of a slot see: lists of cells by sequence, made once a slot (and window)
// and used by every layer.
#pragma once

#include "cache/key_sources.h"
#include "mixedkv/attention.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mixedkv {

class Visibility {
public:
  /// Where no cell is shared, lists of num_cells cells are made without growing. Throws
  /// std::bad_alloc.
  Visibility(std::int64_t num_cells, int n_seq_max);

  /// A slot of n tokens, token i at pos[i]; it sees what sequence seq[i] sees. Throws
  /// std::bad_alloc; there is no slot then.
  void begin_slot(const std::int32_t *pos, const std::int32_t *seq, std::int64_t n);
  void end_slot() noexcept;

  /// One problem for each sequence of the slot, over its keys with positions that any of its
  /// tokens sees: in cold, then hot, then scratch. What attention still has to look at is each
  /// query's own position. Valid until the next call. Throws std::bad_alloc, where it is the first
  /// call of a slot with this window and the lists must grow; nothing changes then.
  const std::vector<AttentionProblem> &problems(const KeySources &sources, int layer,
                                                std::int64_t window_left, const QueryView &q,
                                                const OutputView &out);

  std::size_t bytes() const;

private:
  /// The tokens of one sequence: tokens_[begin .. end) where there are more sequences than one,
  /// else all of the slot.
  struct Group {
    int seq;
    std::int64_t begin;
    std::int64_t end;
    std::int32_t pos_min;
    std::int32_t pos_max;
  };
  /// A key segment, but for its layer.
  struct Run {
    Source source;
    bool unbroken; ///< cells follow one another from `first` on
    bool ordered;  ///< so do positions, from first_pos on
    std::int32_t first;
    std::int32_t first_pos;
    std::int64_t begin; ///< into index and pos
    std::int64_t len;
  };
  struct Lists {
    std::int64_t window_left = -1;
    std::vector<std::int32_t> index; ///< ascending within a run
    std::vector<std::int32_t> pos;   ///< as long as index; what lies behind the runs is garbage
    std::vector<Run> runs;
    std::vector<std::int64_t> group_end; ///< one past a group's last run
    std::vector<KeySegment> segments;    ///< one a run; filled in by each call
    std::vector<AttentionProblem> problems;
  };

  Lists &lists_for(const KeySources &sources, std::int64_t window_left);
  void build(Lists &lists, const KeySources &sources, std::int64_t window_left) const;
  static void finish_run(Lists &lists, Source source, std::int64_t begin, std::int64_t len);

  std::vector<std::int32_t> tokens_; ///< of the slot, by group; ascending within
  std::vector<std::int32_t> pos_;    ///< of tokens_[i], or of token i where there is one group
  std::vector<Group> groups_;
  std::vector<std::int64_t> counts_; ///< [n_seq_max], scratch of begin_slot
  std::vector<Lists> lists_;         ///< kept from slot to slot for their memory
  std::size_t num_lists_ = 0;        ///< those of lists_ that are of this slot
};

} // namespace mixedkv
