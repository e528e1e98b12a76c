// What query rows see of a run of keys, against the definition key by key: positions in order and
// out of it, causal, windows, masks of all types, ALiBi.
//
// Usage: test_sight [part of a check's name]

#include "attention/sight.h"
#include "checks.h"
#include "kernels/dispatch.h"

using namespace mixedkv;
using namespace testing;

namespace {

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

constexpr int kHeads = 4;
constexpr int kGroup = 2;

/// Queries, keys and options of one case.
struct Case {
  AttentionParams params;
  QueryView q;
  KeySegment segment;
  MaskView mask;
  std::vector<std::int32_t> q_pos, k_pos;
  std::vector<float> slopes, float_mask;
  std::vector<f16_t> half_mask;
  std::vector<unsigned char> boolean_mask;

  explicit Case(Random &random, std::int64_t num_queries, std::int64_t num_keys) {
    params.num_qo_heads = kHeads;
    params.num_kv_heads = kHeads / kGroup;
    q.len = num_queries;
    q.pos_start = between(random, 0, 30);
    segment.len = num_keys;
    segment.pos_start = between(random, 0, 30);
  }
  void shuffle_positions(Random &random) {
    for (std::int64_t j = 0; j < segment.len; ++j)
      k_pos.push_back(static_cast<std::int32_t>(segment.pos_start + j));
    std::shuffle(k_pos.begin(), k_pos.end(), random);
    segment.pos = k_pos.data();
  }
  void scatter_queries(Random &random) {
    for (std::int64_t i = 0; i < q.len; ++i)
      q_pos.push_back(between(random, 0, 80));
    q.pos = q_pos.data();
  }
  void add_slopes() {
    slopes = {0.5f, 0.25f, 0.125f, 1.0f};
    params.alibi_slopes = slopes.data();
  }
  void add_mask(Random &random, MaskType type) {
    const std::size_t entries = size(kHeads * q.len * segment.len);
    constexpr f16_t half_minus_infinity = 0xfc00, half_one = 0x3c00;
    for (std::size_t i = 0; i < entries; ++i) {
      const bool hidden = random() % 3 == 0;
      boolean_mask.push_back(!hidden);
      float_mask.push_back(hidden ? -kInf : normal(random));
      half_mask.push_back(hidden ? half_minus_infinity : half_one);
    }
    mask.type = type;
    mask.data = type == MaskType::boolean ? static_cast<const void *>(boolean_mask.data())
                : type == MaskType::f16   ? static_cast<const void *>(half_mask.data())
                                          : static_cast<const void *>(float_mask.data());
    mask.key_stride = type == MaskType::boolean ? 1 : type == MaskType::f16 ? 2 : 4;
    mask.query_stride = mask.key_stride * segment.len;
    mask.head_stride = mask.query_stride * q.len;
  }

  std::int64_t query_position(std::int64_t i) const {
    return q_pos.empty() ? q.pos_start + i : q_pos[size(i)];
  }
  std::int64_t key_position(std::int64_t j) const {
    return k_pos.empty() ? segment.pos_start + j : k_pos[size(j)];
  }
  /// A logit of 1 after everything that hides or shifts it, by definition.
  double want(int h, std::int64_t i, std::int64_t j) const {
    const std::int64_t p = query_position(i), pos = key_position(j);
    if ((params.causal && pos > p) || (params.window_right >= 0 && pos > p + params.window_right))
      return -HUGE_VAL;
    if (params.window_left >= 0 && pos < p - params.window_left)
      return -HUGE_VAL;
    const std::size_t entry = size((h * q.len + i) * segment.len + j);
    const double slope = slopes.empty() ? 1.0 : slopes[size(h)];
    switch (mask.type) {
    case MaskType::none:
      return slopes.empty() ? 1.0 : 1.0 + slope * static_cast<double>(pos - p);
    case MaskType::boolean:
      return !boolean_mask[entry] ? -HUGE_VAL
             : slopes.empty()     ? 1.0
                                  : 1.0 + slope * static_cast<double>(pos - p);
    case MaskType::f16:
      return boolean_mask[entry] ? 1.0 + slope : -HUGE_VAL;
    case MaskType::f32:
      return 1.0 + slope * float_mask[entry];
    }
    return 0.0;
  }
};

/// Walks over all keys in runs of `step`, as a tile does, and compares every logit.
void expect_sight(const Case &c, int step, const char *what) {
  for (int kv_head = 0; kv_head < kHeads / kGroup; ++kv_head) {
    const int num_rows = static_cast<int>(c.q.len * kGroup);
    const QueryRows rows(c.q, kGroup, kv_head, 0, num_rows);
    std::vector<float> bias(size(step));
    Sight sight(active_kernels(), c.params, c.mask, rows, bias.data());
    std::int64_t begin = 0, end = c.segment.len;
    sight.narrow(c.segment, &begin, &end);
    for (int r = 0; r < num_rows; ++r)
      for (std::int64_t j = 0; j < c.segment.len; ++j)
        EXPECT((j >= begin && j < end) || c.want(rows.head(r), rows.query(r), j) == -HUGE_VAL,
               "%s: key %d is cut off, but seen", what, static_cast<int>(j));
    for (std::int64_t run = begin; run < end; run += step) {
      const int n = static_cast<int>(std::min<std::int64_t>(step, end - run));
      const Sight::Seen seen = sight.look(c.segment, run, n);
      int num_seen = 0;
      for (int r = 0; r < num_rows; ++r) {
        std::vector<float> x(size(n), 1.0f);
        Sight::Span span = sight.span(seen, r, n);
        if (seen.visible == Sight::Visible::none)
          span = {0, 0}; // a tile passes over such a run
        EXPECT(span.from >= 0 && span.from <= span.to && span.to <= n, "%s: span", what);
        bool hides = false;
        if (span.from < span.to)
          hides = sight.adjust(seen, c.segment, run + span.from, run + span.from,
                               span.to - span.from, r, x.data() + span.from);
        bool hidden_by_mask = false;
        for (int j = 0; j < n; ++j) {
          const bool inside = j >= span.from && j < span.to;
          const double got = inside ? static_cast<double>(x[size(j)]) : -HUGE_VAL;
          const double want = c.want(rows.head(r), rows.query(r), run + j);
          EXPECT(got == want || std::fabs(got - want) < 1e-5, "%s: row %d key %d: %g, not %g", what,
                 r, static_cast<int>(run + j), got, want);
          num_seen += want != -HUGE_VAL;
          hidden_by_mask |= inside && want == -HUGE_VAL && c.mask.type != MaskType::none &&
                            seen.visible == Sight::Visible::all;
        }
        EXPECT(hides || !hidden_by_mask, "%s: row %d: does not say that the mask hides", what, r);
      }
      EXPECT(seen.visible != Sight::Visible::none || num_seen == 0, "%s: none", what);
      if (c.mask.type == MaskType::none) {
        EXPECT(seen.visible != Sight::Visible::all || num_seen == n * num_rows, "%s: all", what);
      }
    }
  }
}

void test_sight(bool shuffled, bool scattered, MaskType mask, bool slopes) {
  static const char *const names[] = {"no mask", "f32 mask", "f16 mask", "boolean mask"};
  const std::string name = std::string(shuffled ? "keys in disorder, " : "keys in order, ") +
                           (scattered ? "queries anywhere, " : "queries in order, ") +
                           names[static_cast<int>(mask)] + (slopes ? ", slopes" : "");
  check(name, [&] {
    Random random(21);
    for (const std::int64_t num_queries : {1, 5, 12})
      for (const std::int64_t num_keys : {1, 7, 40, 64})
        for (const int left : {-1, 0, 3, 25, 200})
          for (const int right : {-1, 0, 2, 30, 300, -2}) {
            Case c(random, num_queries, num_keys);
            c.params.causal = right == -2;
            c.params.window_left = left;
            c.params.window_right = c.params.causal ? left : right; // which causal overrules
            if (shuffled)
              c.shuffle_positions(random);
            if (scattered)
              c.scatter_queries(random);
            if (mask != MaskType::none)
              c.add_mask(random, mask);
            if (slopes)
              c.add_slopes();
            expect_sight(c, 16, "runs of 16");
            expect_sight(c, 64, "one run");
          }
  });
}

void test_rows() {
  check("rows are queries by heads of the group, wherever they begin", [] {
    const std::vector<std::int32_t> pos{30, 10, 50, 20};
    const std::vector<std::int32_t> index{2, 0, 3, 1};
    QueryView q;
    q.pos = pos.data();
    q.index = index.data();
    q.len = 4;
    std::vector<float> data(size(4 * kHeads * 3));
    for (std::size_t i = 0; i < data.size(); ++i)
      data[i] = static_cast<float>(i);
    q.data = data.data();
    q.row_stride = kHeads * 3 * 4;
    q.head_stride = 3 * 4;
    const QueryRows rows(q, kGroup, 1, 3, 4); // query 1 head 3, query 2 heads 2 and 3, query 3
    EXPECT(rows.pos_min() == 10 && rows.pos_max() == 50, "positions");
    float loaded[4 * 3];
    rows.load(active_kernels(), 3, 2.0f, nullptr, loaded);
    const int queries[] = {1, 2, 2, 3}, heads[] = {3, 2, 3, 2};
    for (int r = 0; r < 4; ++r) {
      EXPECT(rows.query(r) == queries[r] && rows.head(r) == heads[r], "row %d", r);
      EXPECT(rows.number(r) == heads[r] * 4 + queries[r], "row %d", r);
      EXPECT(rows.pos(r) == pos[size(queries[r])], "row %d", r);
      for (int d = 0; d < 3; ++d)
        EXPECT(loaded[r * 3 + d] ==
                   2 * data[size((index[size(queries[r])] * kHeads + heads[r]) * 3 + d)],
               "row %d", r);
    }
  });
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  test_rows();
  for (const bool shuffled : {false, true})
    for (const bool scattered : {false, true})
      for (const MaskType mask : {MaskType::none, MaskType::f32, MaskType::f16, MaskType::boolean})
        for (const bool slopes : {false, true})
          test_sight(shuffled, scattered, mask, slopes);
  return summary();
}
