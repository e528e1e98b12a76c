#include "cache/visibility.h"

#include <algorithm>

namespace mixedkv {
namespace {

/// Windows whose lists are kept side by side. Models have one or two (layers with a window among
/// layers without); whoever asks for more has lists made anew.
constexpr std::size_t kMaxLists = 4;

template <typename T> void grow(std::vector<T> &v, std::int64_t size) {
  if (static_cast<std::int64_t>(v.size()) < size) {
    v.resize(static_cast<std::size_t>(size));
  }
}

template <typename T> std::size_t bytes_of(const std::vector<T> &v) {
  return v.capacity() * sizeof(T);
}

} // namespace

Visibility::Visibility(std::int64_t num_cells, int n_seq_max)
    : counts_(static_cast<std::size_t>(n_seq_max)) {
  lists_.reserve(kMaxLists);
  lists_.emplace_back();
  // Sequences that share nothing list every cell once at most; each next list is given room for
  // all cells of its tier besides.
  grow(lists_[0].index, 2 * num_cells);
  grow(lists_[0].pos, 2 * num_cells);
  // A decode step of every sequence must not allocate either.
  const std::size_t num_groups = counts_.size();
  tokens_.reserve(num_groups);
  pos_.reserve(num_groups);
  groups_.reserve(num_groups);
  lists_[0].group_end.reserve(num_groups);
  lists_[0].problems.reserve(num_groups);
  lists_[0].runs.reserve(3 * num_groups);
  lists_[0].segments.reserve(3 * num_groups);
}

void Visibility::begin_slot(const std::int32_t *pos, const std::int32_t *seq, std::int64_t n) {
  num_lists_ = 0;
  groups_.clear();
  tokens_.clear();
  pos_.assign(pos, pos + n);
  if (std::all_of(seq, seq + n, [seq](std::int32_t s) { return s == seq[0]; })) {
    const auto range = std::minmax_element(pos, pos + n);
    groups_.push_back({seq[0], 0, n, *range.first, *range.second});
    return;
  }
  std::fill(counts_.begin(), counts_.end(), 0);
  for (std::int64_t i = 0; i < n; ++i) {
    ++counts_[static_cast<std::size_t>(seq[i])];
  }
  std::int64_t begin = 0;
  for (std::size_t s = 0; s < counts_.size(); ++s) {
    if (counts_[s] > 0) {
      groups_.push_back({static_cast<int>(s), begin, begin + counts_[s], INT32_MAX, 0});
    }
    begin += counts_[s];
    counts_[s] = begin - counts_[s]; // where the sequence's next token goes
  }
  tokens_.resize(static_cast<std::size_t>(n));
  for (std::int64_t i = 0; i < n; ++i) {
    const std::size_t place = static_cast<std::size_t>(counts_[static_cast<std::size_t>(seq[i])]++);
    tokens_[place] = static_cast<std::int32_t>(i);
    pos_[place] = pos[i];
  }
  for (Group &group : groups_) {
    const auto range = std::minmax_element(pos_.begin() + group.begin, pos_.begin() + group.end);
    group.pos_min = *range.first;
    group.pos_max = *range.second;
  }
}

void Visibility::end_slot() noexcept {
  num_lists_ = 0;
  groups_.clear();
}

void Visibility::finish_run(Lists &lists, Source source, std::int64_t begin, std::int64_t len) {
  if (len == 0) {
    return;
  }
  const std::int32_t *index = lists.index.data() + begin;
  const std::int32_t *pos = lists.pos.data() + begin;
  std::int64_t ordered = 1;
  while (ordered < len && pos[ordered] == pos[ordered - 1] + 1) {
    ++ordered;
  }
  lists.runs.push_back(
      {source, index[len - 1] - index[0] == len - 1, ordered == len, index[0], pos[0], begin, len});
}

void Visibility::build(Lists &lists, const KeySources &sources, std::int64_t window_left) const {
  lists.window_left = window_left;
  lists.runs.clear();
  lists.group_end.clear();
  std::int64_t end = 0; // of what is listed
  for (const Group &group : groups_) {
    const std::int64_t high = group.pos_max;
    const std::int64_t low = window_left < 0 ? 0 : group.pos_min - std::min(window_left, high);
    for (const Source source : {Source::cold, Source::hot}) {
      const bool hot = source == Source::hot;
      const Cells &cells = hot ? sources.hot.cells : sources.cold.cells;
      grow(lists.index, end + cells.num_used());
      grow(lists.pos, end + cells.num_used());
      const std::int64_t len = cells.collect(group.seq, low, high, hot, lists.index.data() + end,
                                             lists.pos.data() + end);
      finish_run(lists, source, end, len);
      end += len;
    }
    grow(lists.index, end + sources.num_scratch);
    grow(lists.pos, end + sources.num_scratch);
    std::int64_t len = 0;
    for (std::int64_t row = 0; row < sources.num_scratch; ++row) {
      const std::int32_t cell = sources.scratch_cells[row];
      const std::int32_t pos = sources.cold.cells.pos(cell);
      if (sources.cold.cells.owned_by(cell, group.seq) && pos >= low && pos <= high) {
        lists.index[static_cast<std::size_t>(end + len)] = static_cast<std::int32_t>(row);
        lists.pos[static_cast<std::size_t>(end + len)] = pos;
        ++len;
      }
    }
    finish_run(lists, Source::scratch, end, len);
    end += len;
    lists.group_end.push_back(static_cast<std::int64_t>(lists.runs.size()));
  }
  lists.segments.resize(lists.runs.size());
  lists.problems.resize(groups_.size());
}

Visibility::Lists &Visibility::lists_for(const KeySources &sources, std::int64_t window_left) {
  for (std::size_t i = 0; i < num_lists_; ++i) {
    if (lists_[i].window_left == window_left) {
      return lists_[i];
    }
  }
  if (num_lists_ == kMaxLists) {
    --num_lists_;
  }
  if (lists_.size() == num_lists_) {
    lists_.emplace_back();
  }
  build(lists_[num_lists_], sources, window_left);
  return lists_[num_lists_++];
}

const std::vector<AttentionProblem> &Visibility::problems(const KeySources &sources, int layer,
                                                          std::int64_t window_left,
                                                          const QueryView &q,
                                                          const OutputView &out) {
  Lists &lists = lists_for(sources, window_left);
  for (std::size_t i = 0; i < lists.runs.size(); ++i) {
    const Run &run = lists.runs[i];
    const std::int64_t first = run.unbroken ? run.first : 0;
    KeySegment &segment = lists.segments[i];
    segment = run.source == Source::scratch ? sources.scratch->segment(0, first)
              : run.source == Source::hot   ? sources.hot.rows.segment(layer, first)
                                            : sources.cold.rows.segment(layer, first);
    segment.index = run.unbroken ? nullptr : lists.index.data() + run.begin;
    segment.pos = run.ordered ? nullptr : lists.pos.data() + run.begin;
    segment.pos_start = run.first_pos;
    segment.len = run.len;
  }
  std::int64_t run_begin = 0;
  for (std::size_t g = 0; g < groups_.size(); ++g) {
    const Group &group = groups_[g];
    const std::int32_t *index = groups_.size() > 1 ? tokens_.data() + group.begin : nullptr;
    AttentionProblem &problem = lists.problems[g];
    problem.q = q;
    problem.q.index = index;
    problem.q.pos = pos_.data() + group.begin;
    problem.q.len = group.end - group.begin;
    problem.out = out;
    problem.out.index = index;
    problem.segments = lists.segments.data() + run_begin;
    problem.num_segments = static_cast<int>(lists.group_end[g] - run_begin);
    run_begin = lists.group_end[g];
  }
  return lists.problems;
}

std::size_t Visibility::bytes() const {
  std::size_t sum =
      bytes_of(tokens_) + bytes_of(pos_) + bytes_of(groups_) + bytes_of(counts_) + bytes_of(lists_);
  for (const Lists &lists : lists_) {
    sum += bytes_of(lists.index) + bytes_of(lists.pos) + bytes_of(lists.runs) +
           bytes_of(lists.group_end) + bytes_of(lists.segments) + bytes_of(lists.problems);
  }
  return sum;
}

} // namespace mixedkv
