// qk over tiles of Q4_0 keys, of every instruction set that this machine can run, against float64
// on the values that the blocks stand for.
//
// The bound follows from what the kernel rounds: a query row, to steps of its largest magnitude /
// 16256; half a step is what each number may be off by, and f32 roundings come on top.
//
// Usage: test_tile_keys [part of a check's name]

#include "tile_cases.h"

using namespace mixedkv;
using namespace testing;

namespace {

struct Prepared {
  std::vector<float> floats;
  Prepared(const Kernels &kernels, const float *q, std::size_t ld_q, int num_rows, int dim) {
    const std::size_t n = tile_query_floats(size(dim)) * size(num_rows);
    Output<float> out(n, 1);
    kernels.tiles_of(Format::q4_0)->prepare_query(q, ld_q, num_rows, dim, out.data());
    EXPECT(out.guards_intact(), "guards of a prepared query: rows %d dim %d", num_rows, dim);
    floats.assign(out.data(), out.data() + n);
  }
};

/// Scores of a query row against tiles [first, first + count), alone.
std::vector<float> scores_alone(const Kernels &kernels, const float *q, const TileSet &keys,
                                int first, int count) {
  const Prepared prepared(kernels, q, 0, 1, keys.dim);
  std::vector<float> scores(size(count * kTokens));
  const Rows rows = keys.rows_from(first);
  kernels.tiles_of(Format::q4_0)
      ->qk(prepared.floats.data(), 1, &rows, count, keys.dim, scores.data(), 0);
  return scores;
}

void expect_scores(const float *scores, const float *q, const TileSet &keys, bool typical) {
  double largest = 0, norm_q = 0;
  for (int i = 0; i < keys.dim; ++i) {
    largest = std::max(largest, std::fabs(static_cast<double>(q[i])));
    norm_q += static_cast<double>(q[i]) * q[i];
  }
  for (int j = 0; j < keys.num_tokens(); ++j) {
    double expected = 0, magnitude = 0, sum_k = 0, norm_k = 0;
    for (int i = 0; i < keys.dim; ++i) {
      const double k = keys.value(j, i);
      expected += q[i] * k;
      magnitude += std::fabs(q[i] * k);
      sum_k += std::fabs(k);
      norm_k += k * k;
    }
    const double rounding = 0.5 / 16256 * largest * sum_k;
    // Denormal results round to steps of their own; rows below 1e-30 count as zeros.
    const double tiny = 1e-30 * sum_k + FLT_TRUE_MIN;
    const double bound = rounding + (keys.dim + 8) * kUlp * magnitude + tiny;
    const double error = std::fabs(scores[j] - expected);
    EXPECT(error <= bound, "tiles %d dim %d: key %d: %.9g, not %.9g, bound %.3g", keys.num,
           keys.dim, j, static_cast<double>(scores[j]), expected, bound);
    if (typical)
      EXPECT(error <= 1e-4 * std::sqrt(norm_q * norm_k), "tiles %d dim %d: key %d off by %.3g",
             keys.num, keys.dim, j, error);
  }
}

void check_qk_packed(const Kernels &kernels, Random &random, int num_rows, int num_tiles, int dim,
                     Order order) {
  TileSet keys(random, Kind::keys, num_tiles, dim, order);
  FloatRows q(random, num_rows, dim, between(random, 0, 5));
  for (int r = 0; r < num_rows; ++r)
    for (int i = 0; i < dim; ++i)
      q.row(r)[i] = normal(random);
  OutputRows scores(random, num_rows, keys.num_tokens(), between(random, 0, 5));
  const Prepared prepared(kernels, q.row(0), q.ld, num_rows, dim);
  const Rows rows = keys.rows();
  kernels.tiles_of(Format::q4_0)
      ->qk(prepared.floats.data(), num_rows, &rows, num_tiles, dim, scores.row(0), scores.ld);
  EXPECT(scores.untouched_between(), "guards: rows %d tiles %d dim %d", num_rows, num_tiles, dim);
  for (int r = 0; r < num_rows; ++r) {
    expect_scores(scores.row(r), q.row(r), keys, true);
    const int t = between(random, 0, num_tiles - 1);
    const std::vector<float> alone = scores_alone(kernels, q.row(r), keys, t, 1);
    EXPECT(same_bits(scores.row(r) + t * kTokens, alone.data(), alone.size()),
           "rows %d tiles %d dim %d: row %d tile %d has other bits than alone", num_rows, num_tiles,
           dim, r, t);
  }
}

void test_qk_packed(const std::string &isa, const Kernels &kernels) {
  check(isa + " qk_packed shapes", [&] {
    sweep_packed(51, [&](Random &random, int num_rows, int num_tiles, int dim, Order order) {
      check_qk_packed(kernels, random, num_rows, num_tiles, dim, order);
    });
  });
  check(isa + " qk_packed of query rows that are hard to round", [&] {
    Random random(52);
    const std::vector<void (*)(Random &, float *, int)> makers = {
        [](Random &, float *q, int n) { std::fill(q, q + n, 0.0f); },
        [](Random &, float *q, int n) { std::fill(q, q + n, -0.0f); },
        [](Random &, float *q, int n) { std::fill(q, q + n, 1.0f); },
        [](Random &, float *q, int n) { std::fill(q, q + n, -1.0f); },
        [](Random &random_, float *q, int n) { // one large, the rest at half a step: all round off
          for (int i = 0; i < n; ++i)
            q[i] = 1.001f / 32512 * static_cast<float>(2 * (random_() % 8) + 1);
          q[random_() % size(n)] = random_() % 2 ? -1.0f : 1.0f;
        },
        [](Random &random_, float *q, int n) { // the largest number, either sign
          for (int i = 0; i < n; ++i)
            q[i] = random_() % 2 ? -3.7f : 3.7f;
        },
        [](Random &random_, float *q, int n) { // many magnitudes
          for (int i = 0; i < n; ++i)
            q[i] = std::ldexp(normal(random_), between(random_, -30, 10));
        },
        [](Random &random_, float *q, int n) {
          for (int i = 0; i < n; ++i)
            q[i] = 1e30f * normal(random_);
        },
        [](Random &random_, float *q, int n) {
          for (int i = 0; i < n; ++i)
            q[i] = random_() % 2 ? -1e34f : 1e34f;
        },
        [](Random &random_, float *q, int n) {
          for (int i = 0; i < n; ++i)
            q[i] = 1e-25f * normal(random_);
        },
        [](Random &random_, float *q, int n) {
          for (int i = 0; i < n; ++i)
            q[i] = 1e-33f * normal(random_);
        },
        [](Random &random_, float *q, int n) { // denormals
          for (int i = 0; i < n; ++i)
            q[i] = float_of(static_cast<std::uint32_t>(random_() & 0x803fffff));
        },
        [](Random &random_, float *q, int n) {
          std::fill(q, q + n, 0.0f);
          q[random_() % size(n)] = FLT_TRUE_MIN;
        }};
    for (int dim : {32, 96, 512})
      for (const auto &maker : makers) {
        TileSet keys(random, Kind::keys, 2, dim, Order::dense);
        for (int b = 0; b < keys.num_blocks; ++b) { // all products of one sign, at either end
          block_q4_0 block;
          block.d = half_of(1.0f);
          std::memset(block.qs, 0x00, sizeof block.qs);
          keys.put(3, b, block);
          std::memset(block.qs, 0xff, sizeof block.qs);
          keys.put(21, b, block);
        }
        std::vector<float> q(size(dim));
        maker(random, q.data(), dim);
        const std::vector<float> scores = scores_alone(kernels, q.data(), keys, 0, 2);
        expect_scores(scores.data(), q.data(), keys, false);
      }
    { // The largest numbers that there are.
      TileSet keys(random, Kind::keys, 1, 32, Order::dense);
      for (int j = 0; j < kTokens; ++j)
        keys.set_scale(j, 0, half_of(1.0f / 512));
      std::vector<float> q(32);
      for (float &x : q)
        x = random() % 2 ? -FLT_MAX : FLT_MAX;
      expect_scores(scores_alone(kernels, q.data(), keys, 0, 1).data(), q.data(), keys, false);
    }
  });
  check(isa + " qk_packed NaN and infinity of a query row reach its scores alone", [&] {
    Random random(53);
    for (int num_rows : {1, 3, 4, 8})
      for (float bad : {kNan, -kNan, kInf, -kInf, float_of(0xff800001u)})
        for (int bad_row = 0; bad_row < num_rows; ++bad_row) {
          const int dim = 64;
          TileSet keys(random, Kind::keys, 3, dim, Order::dense);
          FloatRows q(random, num_rows, dim, 0);
          for (int r = 0; r < num_rows; ++r)
            for (int i = 0; i < dim; ++i)
              q.row(r)[i] = normal(random);
          q.row(bad_row)[between(random, 0, dim - 1)] = bad;
          OutputRows scores(random, num_rows, keys.num_tokens(), 0);
          const Prepared prepared(kernels, q.row(0), q.ld, num_rows, dim);
          const Rows rows = keys.rows();
          kernels.tiles_of(Format::q4_0)
              ->qk(prepared.floats.data(), num_rows, &rows, 3, dim, scores.row(0), scores.ld);
          for (int r = 0; r < num_rows; ++r) {
            if (r != bad_row) {
              expect_scores(scores.row(r), q.row(r), keys, true);
              continue;
            }
            for (int j = 0; j < keys.num_tokens(); ++j) {
              // Where nothing is rounded, an infinity is free to stay one.
              const bool stays = isa == "scalar" && std::isinf(bad);
              const float score = scores.row(r)[j];
              EXPECT(stays ? !std::isfinite(score) : std::isnan(score), "row %d key %d: %g", r, j,
                     static_cast<double>(score));
            }
          }
        }
  });
  check(isa + " qk_packed NaN and infinity of a key reach its own scores alone", [&] {
    Random random(54);
    for (int num_rows : {1, 2, 4, 7})
      for (f16_t bad : {0x7e00, 0xfe00, 0x7c01, 0x7c00, 0xfc00})
        for (int bad_key = 0; bad_key < 32; bad_key += 3) {
          const int dim = 96;
          TileSet keys(random, Kind::keys, 2, dim, Order::dense);
          std::vector<float> q(size(num_rows * dim));
          for (float &x : q)
            x = normal(random);
          const Prepared prepared(kernels, q.data(), size(dim), num_rows, dim);
          const Rows rows = keys.rows();
          std::vector<float> before(size(num_rows) * 32), after(before.size());
          const auto run = [&](std::vector<float> &scores) {
            kernels.tiles_of(Format::q4_0)
                ->qk(prepared.floats.data(), num_rows, &rows, 2, dim, scores.data(), 32);
          };
          run(before);
          keys.set_scale(bad_key, between(random, 0, 2), bad);
          run(after);
          for (std::size_t i = 0; i < after.size(); ++i)
            if (static_cast<int>(i % 32) == bad_key)
              EXPECT(!std::isfinite(after[i]), "key %d: %g", bad_key,
                     static_cast<double>(after[i]));
            else
              EXPECT(bits_of(after[i]) == bits_of(before[i]), "bits beside key %d", bad_key);
        }
  });
  check(isa + " qk_packed without rows or tiles touches nothing", [&] {
    const Rows none = {nullptr, 0, nullptr};
    std::vector<float> q(64, 1.0f), out(64, 5.0f), expected = out;
    const Prepared prepared(kernels, q.data(), 32, 1, 32);
    kernels.tiles_of(Format::q4_0)->qk(prepared.floats.data(), 1, &none, 0, 32, out.data(), 16);
    kernels.tiles_of(Format::q4_0)->qk(prepared.floats.data(), 0, &none, 0, 32, out.data(), 16);
    kernels.tiles_of(Format::q4_0)->prepare_query(q.data(), 32, 0, 32, out.data());
    EXPECT(out == expected, "wrote");
  });
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  on_each_isa(test_qk_packed);
  return summary();
}
