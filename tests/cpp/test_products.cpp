// The parts that hold numbers, alone: a tile's states, its scores, and both kinds of products over
// one run of keys, against float64.
//
// Usage: test_products [part of a check's name]

#include "attention/products.h"
#include "checks.h"
#include "kernels/dispatch.h"

using namespace mixedkv;
using namespace testing;

namespace {

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

constexpr int kDim = 32;
constexpr int kDimV = 64;

/// Scratch memory that must be enough.
struct Memory {
  explicit Memory(std::size_t floats) : storage(floats + 16) {
    const auto address = reinterpret_cast<std::uintptr_t>(storage.data());
    begin = storage.data() + (64 - address % 64) % 64 / sizeof(float);
  }
  std::vector<float> storage;
  float *begin;
};

/// num_rows queries of one head over num_keys f32 keys and values.
struct Fixture {
  std::vector<float> q, k, v;
  QueryView view;
  KeySegment segment;
  QueryRows rows;
  int num_rows, num_keys;

  Fixture(Random &random, int rows_, int keys_)
      : q(size(rows_ * kDim)), k(size(keys_ * kDim)), v(size(keys_ * kDimV)), view(), segment(),
        rows((view.len = rows_, view), 1, 0, 0, rows_), num_rows(rows_), num_keys(keys_) {
    for (auto *values : {&q, &k, &v})
      for (float &x : *values)
        x = normal(random);
    segment.k = k.data();
    segment.v = v.data();
    segment.k_row_stride = kDim * 4;
    segment.v_row_stride = kDimV * 4;
    segment.len = num_keys;
  }
  double logit(int r, int j) const {
    double x = 0;
    for (int d = 0; d < kDim; ++d)
      x += static_cast<double>(q[size(r * kDim + d)]) * k[size(j * kDim + d)];
    return x;
  }
};

/// One run through products, rows seeing keys [from(r), to(r)), against the definition.
template <typename P> void expect_products(Fixture &f, double tolerance, bool hidden_nan) {
  const Kernels &kernels = active_kernels();
  const auto from = [&](int r) { return hidden_nan ? std::min(r % 3, f.num_keys) : 0; };
  const auto to = [&](int r) {
    return std::max(from(r), f.num_keys - (hidden_nan ? 1 + r % 2 : 0));
  };
  if (hidden_nan) // a value that nobody sees
    std::fill_n(f.v.begin() + (f.num_keys - 1) * kDimV, kDimV, kNan);
  Memory memory(Scores::scratch_floats(f.num_rows, kChunkKeys) +
                TileStates::scratch_floats(f.num_rows, kDimV) +
                std::max(F32Products::scratch_floats(f.num_rows, kChunkKeys, kDim, kDimV),
                         Bf16Products::scratch_floats(kDim, kDimV)));
  Scratch scratch(memory.begin);
  TileStates states(kernels, f.rows, kDimV, scratch);
  Scores scores(scratch, f.num_rows, kChunkKeys);
  P products({kernels, f.num_rows, kDim, kDimV, f.q.data(), states, scores}, scratch);
  KeyRun run(0, kChunkKeys);
  run.take(f.segment, 0, f.num_keys);
  products.compute_scores(run);
  for (int r = 0; r < f.num_rows; ++r)
    for (int j = 0; j < f.num_keys; ++j) {
      const double x = f.logit(r, j);
      EXPECT(std::fabs(scores.by_key(run)[size(r) * scores.ld() + size(j)] - x) <=
                 tolerance * (20 + std::fabs(x)),
             "score of row %d and key %d", r, j);
    }
  for (int r = 0; r < f.num_rows; ++r)
    products.weigh_row(run, r, from(r), to(r));
  products.add_values(run, hidden_nan);
  std::vector<float> out(size(f.num_rows * kDimV)), lse(size(f.num_rows));
  OutputView view;
  view.data = out.data();
  view.row_stride = kDimV;
  view.lse = lse.data();
  view.lse_row_stride = 1;
  states.finalize(nullptr, nullptr, view);
  for (int r = 0; r < f.num_rows; ++r) {
    double m = -HUGE_VAL, s = 0;
    for (int j = from(r); j < to(r); ++j)
      m = std::max(m, f.logit(r, j));
    std::vector<double> want(kDimV, 0.0);
    for (int j = from(r); j < to(r); ++j) {
      const double weight = std::exp(f.logit(r, j) - m);
      s += weight;
      for (std::size_t d = 0; d < kDimV; ++d)
        want[d] += weight * f.v[size(j) * kDimV + d];
    }
    if (s == 0) {
      EXPECT(lse[size(r)] == -kInf, "row %d sees nothing", r);
      continue;
    }
    EXPECT(std::fabs(lse[size(r)] - (m + std::log(s))) <= tolerance * (20 + std::fabs(m)),
           "lse of row %d", r);
    for (std::size_t d = 0; d < kDimV; ++d)
      EXPECT(std::fabs(out[size(r) * kDimV + d] - want[d] / s) <= 20 * tolerance,
             "row %d: %g, not %g", r, static_cast<double>(out[size(r) * kDimV + d]), want[d] / s);
  }
}

void test_products(const std::string &isa) {
  for (const bool hidden : {false, true}) {
    check(isa + " f32 products" + (hidden ? ", some keys hidden" : ""), [&] {
      Random random(31);
      for (const int rows : {1, 4, 8, 9, 33, kTileRows})
        for (const int keys : {1, 15, 16, 17, 100, 256}) {
          Fixture f(random, rows, keys);
          expect_products<F32Products>(f, 2e-6, hidden);
        }
    });
    if (active_kernels().bf16 == nullptr)
      continue;
    check(isa + " bf16 products" + (hidden ? ", some keys hidden" : ""), [&] {
      Random random(32);
      for (const int rows : {9, 33, kTileRows})
        for (const int keys : {1, 15, 16, 17, 100, 256}) {
          Fixture f(random, rows, keys);
          expect_products<Bf16Products>(f, 1.0 / 64, hidden);
        }
    });
  }
}

/// States in memory of their own, which holds NaN at first.
struct Owned : private Memory, private Scratch, public TileStates {
  Owned(const Kernels &kernels, const QueryRows &rows)
      : Memory(TileStates::scratch_floats(rows.count(), kDimV)), Scratch(filled()),
        TileStates(kernels, rows, kDimV, *this) {}

private:
  float *filled() {
    std::fill(storage.begin(), storage.end(), kNan);
    return begin;
  }
};

void test_states() {
  const Kernels &kernels = active_kernels();
  QueryView q;
  q.len = 3;
  const QueryRows rows(q, 1, 0, 0, 3);
  check("an accumulator is reset while nothing was seen, and never again", [&] {
    Owned states(kernels, rows);
    float *acc = states.acc();
    const float hidden[] = {-kInf, -kInf};
    EXPECT(!states.raise_maximum(0, hidden, 2) && states.m(0) == -kInf, "nothing visible");
    EXPECT(std::isnan(acc[0]), "left as it was");
    const float low[] = {-kInf, 1.0f};
    EXPECT(states.raise_maximum(0, low, 2) && states.m(0) == 1.0f && acc[0] == 0.0f, "first key");
    states.add_to_sum(0, 2.0f);
    acc[0] = 8.0f;
    const float high[] = {1.0f + std::log(2.0f)};
    EXPECT(states.raise_maximum(0, high, 1), "a larger one");
    EXPECT(std::fabs(acc[0] - 4.0f) < 1e-6f, "acc follows");
    const float bad[] = {kInf};
    EXPECT(!states.raise_maximum(1, bad, 1) && std::isnan(states.m(1)), "not a number");
    EXPECT(std::isnan(acc[kDimV + 5]), "stays seen");
  });
  check("many sums keep to one size of error, whenever rows come to see keys", [&] {
    // Rows 0, 1 and 2 see sums from number 0, 40 and 1500 on; M rises twice on the way.
    const int first[] = {0, 40, 1500};
    constexpr int kNumSums = 2100;
    Owned states(kernels, rows);
    std::vector<double> want(3, 0.0);
    for (int sum = 0; sum < kNumSums; ++sum) {
      const float m = sum < 100 ? 1.0f : sum < 1600 ? 2.0f : 2.5f;
      for (int r = 0; r < 3; ++r)
        if (sum >= first[r] && (sum == first[r] || sum == 100 || sum == 1600)) {
          const float before = states.m(r);
          states.raise_maximum(r, &m, 1);
          if (before != -kInf)
            want[size(r)] *= std::exp(static_cast<double>(before) - m);
        }
      states.begin_sums(1);
      for (int r = 0; r < 3; ++r)
        if (sum >= first[r]) {
          states.add_to_sum(r, 0.1f);
          for (int d = 0; d < kDimV; ++d)
            states.acc(r)[d] += 0.1f;
          want[size(r)] += static_cast<double>(0.1f);
        }
    }
    std::vector<float> ms(6, -kInf), acc(3 * kDimV, kNan);
    states.store({ms.data(), acc.data()});
    for (int r = 0; r < 3; ++r) {
      const double s = ms[size(2 * r + 1)], a = acc[size(r * kDimV + 7)], w = want[size(r)];
      EXPECT(std::fabs(s / w - 1) < 4e-6 && std::fabs(a / w - 1) < 4e-6,
             "row %d: %.9g, %.9g, not %.9g", r, s, a, w);
    }
    // All of them together count as one.
    for (int i = 0; i < 31; ++i)
      states.begin_sums(1);
    EXPECT(states.acc(0)[0] == acc[0], "there is room for so many beside");
    states.begin_sums(1);
    EXPECT(states.acc(0)[0] == 0.0f, "they are put away for the next");
  });
  check("partial states and carried states come back as they were", [&] {
    Random random(33);
    std::vector<float> carried(3 * kDimV, 7.0f), ms(6, 5.0f);
    Owned states(kernels, rows), merged(kernels, rows), again(kernels, rows);
    for (const int r : {0, 2}) { // row 1 sees nothing
      const float x = normal(random);
      states.raise_maximum(r, &x, 1);
      states.add_to_sum(r, 1.0f);
      for (int d = 0; d < kDimV; ++d)
        states.acc(r)[d] = normal(random);
    }
    std::vector<float> partial(TileStates::partial_floats(3, kDimV), kNan);
    states.store_partial(partial.data());
    merged.merge_partial(partial.data());
    merged.store({ms.data(), carried.data()});
    EXPECT(ms[2] == 5.0f && carried[kDimV] == 7.0f, "a row that saw nothing is left alone");
    EXPECT(ms[0] == states.m(0) && ms[1] == 1.0f, "M and S");
    EXPECT(std::memcmp(carried.data(), states.acc(), kDimV * 4) == 0, "acc");
    ms[2] = -kInf;
    again.load({ms.data(), carried.data()});
    EXPECT(again.m(2) == states.m(2) && again.m(1) == -kInf, "loaded");
    EXPECT(std::memcmp(again.acc(2), states.acc(2), kDimV * 4) == 0, "acc");
  });
}

void test_scores() {
  check("scores of scattered keys go to their order and back", [] {
    std::vector<std::int32_t> index{3, 4, 17, 40, 41, 47};
    KeySegment s;
    s.k_layout = s.v_layout = Layout::tiles;
    s.index = index.data();
    s.len = 6;
    KeyRun run(0, kChunkKeys);
    run.take(s, 0, 6);
    Memory memory(Scores::scratch_floats(2, kChunkKeys));
    Scratch scratch(memory.begin);
    Scores scores(scratch, 2, kChunkKeys);
    for (int r = 0; r < 2; ++r)
      for (int t = 0; t < run.num_tokens(); ++t)
        scores.by_token()[size(r) * scores.ld() + size(t)] = static_cast<float>(100 * r + t);
    scores.gather(run);
    for (int r = 0; r < 2; ++r)
      for (int j = 0; j < 6; ++j) // the index names tiles 0, 1 and 2
        EXPECT(scores.by_key(run)[size(r) * scores.ld() + size(j)] ==
                   static_cast<float>(100 * r + index[size(j)]),
               "row %d key %d", r, j);
    scores.scatter(run);
    for (int r = 0; r < 2; ++r)
      for (int t = 0; t < run.num_tokens(); ++t) {
        const bool key = std::find(index.begin(), index.end(), t) != index.end();
        EXPECT(scores.by_token()[size(r) * scores.ld() + size(t)] ==
                   (key ? static_cast<float>(100 * r + t) : 0.0f),
               "row %d token %d", r, t);
      }
  });
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  test_states();
  test_scores();
  for (const std::string &isa : available_isas()) {
    select_isa(isa);
    test_products(isa);
  }
  return summary();
}
