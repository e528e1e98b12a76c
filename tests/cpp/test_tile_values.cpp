// pv over tiles of Q4_0 values, of every instruction set that this machine can run, against float64
// on the values that the blocks stand for.
//
// The bound follows from what the kernel rounds: the weights p * d of a run, to steps of their
// largest / 32767; half a step is what each number may be off by, and f32 roundings come on top.
//
// Usage: test_tile_values [part of a check's name]

#include "tile_cases.h"

using namespace mixedkv;
using namespace testing;

namespace {

/// acc after pv_packed of row r of p alone, from `before`.
std::vector<float> acc_alone(const Kernels &kernels, const float *p, const TileSet &values,
                             const float *before) {
  std::vector<float> acc(before, before + values.dim);
  const Rows rows = values.rows();
  kernels.tiles_of(Format::q4_0)->pv(p, 0, 1, &rows, values.num, values.dim, acc.data(), 0);
  return acc;
}

void expect_acc(const float *acc, const float *before, const float *p, const TileSet &values) {
  constexpr int kRunTokens = 16 * kTokens; // whose weights are rounded together
  for (int b = 0; b < values.num_blocks; ++b) {
    double rounding = 0;
    for (int begin = 0; begin < values.num_tokens(); begin += kRunTokens) {
      double largest = 0;
      int num_seen = 0;
      const int end = std::min(values.num_tokens(), begin + kRunTokens);
      for (int j = begin; j < end; ++j) {
        largest = std::max(largest, std::fabs(p[j] * value_of_half(values.block(j, b).d)));
        num_seen += p[j] != 0.0f;
      }
      // Half a step for each weight, and the three f32 roundings on its way.
      rounding += 8.0 * num_seen * largest * (0.5 / 32767 + 3 * kUlp);
      // What is smaller than that may count as nothing.
      rounding += 8.0 * num_seen * std::min(largest, 1e-30);
    }
    for (int i = b * QK4_0; i < (b + 1) * QK4_0; ++i) {
      double expected = before[i], magnitude = std::fabs(expected);
      for (int j = 0; j < values.num_tokens(); ++j)
        if (p[j] != 0.0f) {
          expected += p[j] * values.value(j, i);
          magnitude += std::fabs(p[j] * values.value(j, i));
        }
      const double bound =
          rounding + (values.num_tokens() + 4) * kUlp * magnitude + 300 * FLT_TRUE_MIN;
      EXPECT(std::fabs(acc[i] - expected) <= bound,
             "tiles %d dim %d: %d: %.9g, not %.9g, bound %.3g", values.num, values.dim, i,
             static_cast<double>(acc[i]), expected, bound);
    }
  }
}

/// Rows of p with zeros among them, as kernels see them, and acc of rows before and after.
struct PvCase {
  TileSet values;
  int num_rows;
  FloatRows p;
  std::vector<float> before; ///< [num_rows, dim]
  PvCase(Random &random, int rows, int num_tiles, int dim, Order order)
      : values(random, Kind::values, num_tiles, dim, order), num_rows(rows),
        p(random, rows, num_tiles * kTokens, between(random, 0, 5)), before(size(rows * dim)) {
    for (int r = 0; r < rows; ++r) {
      const int one_in = between(random, 1, 4);
      for (int j = 0; j < values.num_tokens(); ++j)
        p.row(r)[j] =
            between(random, 1, one_in) > 1 ? 0.0f : std::exp(-2.0f * std::fabs(normal(random)));
    }
    for (float &x : before)
      x = normal(random);
  }
  const float *before_row(int r) const { return before.data() + r * values.dim; }
  std::vector<float> run(const Kernels &kernels) const {
    std::vector<float> acc = before;
    const Rows rows = values.rows();
    kernels.tiles_of(Format::q4_0)
        ->pv(p.row(0), p.ld, num_rows, &rows, values.num, values.dim, acc.data(), size(values.dim));
    return acc;
  }
  void expect(const std::vector<float> &acc) const {
    for (int r = 0; r < num_rows; ++r)
      expect_acc(acc.data() + r * values.dim, before_row(r), p.row(r), values);
  }
  bool seen(int j) const {
    for (int r = 0; r < num_rows; ++r)
      if (p.row(r)[j] != 0.0f)
        return true;
    return false;
  }
};

void check_pv_packed(const Kernels &kernels, Random &random, int num_rows, int num_tiles, int dim,
                     Order order) {
  const PvCase pv(random, num_rows, num_tiles, dim, order);
  OutputRows acc(random, num_rows, dim, between(random, 0, 5));
  for (int r = 0; r < num_rows; ++r)
    std::copy(pv.before_row(r), pv.before_row(r) + dim, acc.row(r));
  const Rows rows = pv.values.rows();
  kernels.tiles_of(Format::q4_0)
      ->pv(pv.p.row(0), pv.p.ld, num_rows, &rows, num_tiles, dim, acc.row(0), acc.ld);
  EXPECT(acc.untouched_between(), "guards: rows %d tiles %d dim %d", num_rows, num_tiles, dim);
  for (int r = 0; r < num_rows; ++r) {
    expect_acc(acc.row(r), pv.before_row(r), pv.p.row(r), pv.values);
    const std::vector<float> alone = acc_alone(kernels, pv.p.row(r), pv.values, pv.before_row(r));
    EXPECT(same_bits(alone.data(), acc.row(r), size(dim)),
           "rows %d tiles %d dim %d: row %d has other bits than alone", num_rows, num_tiles, dim,
           r);
  }
}

void test_pv_packed(const std::string &isa, const Kernels &kernels) {
  check(isa + " pv_packed shapes", [&] {
    sweep_packed(61, [&](Random &random, int num_rows, int num_tiles, int dim, Order order) {
      check_pv_packed(kernels, random, num_rows, num_tiles, dim, order);
    });
  });
  check(isa + " pv_packed of weights and scales of many magnitudes", [&] {
    Random random(62);
    for (int num_rows : {1, 2, 3, 4, 7})
      for (int dim : {32, 96, 128})
        for (int step = 0; step < 12; ++step) {
          PvCase pv(random, num_rows, 1 + step % 3 * 9, dim, kOrders[step % 3]);
          for (int j = 0; j < pv.values.num_tokens(); ++j) {
            for (int b = 0; b < pv.values.num_blocks; ++b)
              if (step % 2)
                pv.values.set_scale(j, b, static_cast<f16_t>(random() & 0xbbff)); // any finite
            for (int r = 0; r < num_rows; ++r)
              pv.p.row(r)[j] *= std::ldexp(1.0f, step < 6    ? between(random, -20, 0)
                                                 : step == 6 ? -60
                                                 : step == 7 ? -88
                                                 : step == 8 ? -110
                                                 : step == 9 ? -130 // denormal
                                                             : between(random, -140, 0));
          }
          pv.expect(pv.run(kernels));
          std::fill(pv.before.begin(), pv.before.end(), 0.0f);
          pv.expect(pv.run(kernels));
        }
  });
  check(isa + " pv_packed rows are as accurate as alone whatever the others see", [&] {
    // Row 0 gives its weight to a token with large values, the others to tokens with small ones.
    Random random(63);
    for (int num_rows : {1, 2, 4, 6}) {
      PvCase pv(random, num_rows, 4, 64, Order::dense);
      std::fill(pv.before.begin(), pv.before.end(), 0.0f);
      for (int b = 0; b < 2; ++b)
        for (int j = 0; j < pv.values.num_tokens(); ++j)
          pv.values.set_scale(j, b, half_of(j == 5 ? 1000.0f : 1e-3f));
      for (int r = 0; r < num_rows; ++r)
        pv.p.row(r)[5] = r == 0 ? 1.0f : r == 1 ? 0.0f : 1e-9f;
      pv.expect(pv.run(kernels));
    }
  });
  check(isa + " pv_packed of zeros adds nothing", [&] {
    Random random(64);
    for (int num_rows : {1, 3, 4, 9}) {
      PvCase pv(random, num_rows, 17, 96, Order::indexed);
      for (int j = 0; j < pv.values.num_tokens(); ++j)
        for (int b = 0; b < 3; ++b)
          pv.values.set_scale(j, b, static_cast<f16_t>(random() % 2 ? 0x8000 : 0));
      EXPECT(pv.run(kernels) == pv.before, "d = 0, %d rows", num_rows);
      PvCase unseen(random, num_rows, 17, 96, Order::dense);
      for (int r = 0; r < num_rows; ++r)
        std::fill(unseen.p.row(r), unseen.p.row(r) + unseen.values.num_tokens(), 0.0f);
      EXPECT(unseen.run(kernels) == unseen.before, "p = 0, %d rows", num_rows);
      for (int j = 0; j < unseen.values.num_tokens(); ++j)
        unseen.values.set_scale(j, j % 3, static_cast<f16_t>(j % 2 ? 0x7e00 : 0xfc00));
      EXPECT(unseen.run(kernels) == unseen.before, "p = 0 and NaN, %d rows", num_rows);
    }
  });
  check(isa + " pv_packed what a row does not see has no say in a bit of its result", [&] {
    Random random(65);
    for (int num_rows : {1, 2, 3, 4, 5, 8})
      for (int num_tiles : {1, 3, 17})
        for (int step = 0; step < 6; ++step) {
          PvCase pv(random, num_rows, num_tiles, 64, kOrders[step % 3]);
          // A token of another row's alone, too.
          const int watched = between(random, 0, num_rows - 1);
          const std::vector<float> expected =
              acc_alone(kernels, pv.p.row(watched), pv.values, pv.before_row(watched));
          for (int j = 0; j < pv.values.num_tokens(); ++j)
            if (pv.p.row(watched)[j] == 0.0f)
              for (int b = 0; b < 2; ++b) {
                pv.values.put(j, b, random_block(random));
                const f16_t odd[] = {0x7e00, 0x7c00, 0xfc00, 0x7bff, 0x7c01, 0};
                if (step > 0 && random() % 4 == 0)
                  pv.values.set_scale(j, b, odd[random() % 6]);
              }
          const std::vector<float> acc = pv.run(kernels);
          EXPECT(same_bits(acc.data() + watched * 64, expected.data(), 64),
                 "rows %d tiles %d step %d", num_rows, num_tiles, step);
        }
  });
  check(isa + " pv_packed NaN and infinity reach the rows that see them, in their block", [&] {
    Random random(66);
    for (int num_rows : {1, 2, 4, 5})
      for (int num_tiles : {1, 2, 17})
        for (f16_t bad : {0x7e00, 0xfe00, 0x7c00, 0xfc00}) {
          PvCase pv(random, num_rows, num_tiles, 96, Order::dense);
          const int token = between(random, 0, pv.values.num_tokens() - 1);
          const int block = between(random, 0, 2);
          for (int r = 0; r < num_rows; ++r)
            pv.p.row(r)[token] = r % 2 ? 0.0f : r == 0 ? 0.5f : FLT_MIN;
          const std::vector<float> before = pv.run(kernels);
          block_q4_0 odd = pv.values.block(token, block);
          odd.d = bad;
          std::memset(odd.qs, 0x2a, sizeof odd.qs);
          pv.values.put(token, block, odd);
          const std::vector<float> after = pv.run(kernels);
          for (int r = 0; r < num_rows; ++r)
            for (int i = 0; i < 96; ++i) {
              const float x = after[size(r * 96 + i)];
              if (i / QK4_0 != block || r % 2)
                EXPECT(bits_of(x) == bits_of(before[size(r * 96 + i)]), "row %d dim %d", r, i);
              else if ((bad & 0x3ff) != 0)
                EXPECT(std::isnan(x), "row %d dim %d: %g", r, i, static_cast<double>(x));
              else // q is 10 in the first half of the block, 2 in the second
                EXPECT(x == ((i % QK4_0 < 16) == (bad == 0x7c00) ? kInf : -kInf),
                       "row %d dim %d: %g", r, i, static_cast<double>(x));
            }
        }
  });
  check(isa + " pv_packed without rows or tiles touches nothing", [&] {
    const Rows none = {nullptr, 0, nullptr};
    std::vector<float> p(32, 1.0f), acc(32, 5.0f), expected = acc;
    kernels.tiles_of(Format::q4_0)->pv(p.data(), 32, 1, &none, 0, 32, acc.data(), 32);
    kernels.tiles_of(Format::q4_0)->pv(p.data(), 32, 0, &none, 0, 32, acc.data(), 32);
    EXPECT(acc == expected, "wrote");
  });
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  on_each_isa(test_pv_packed);
  return summary();
}
