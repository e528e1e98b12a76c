// Panels of keys side by side, of every instruction set that this machine can run: transposing rows
// bit by bit, qk over panels against float64.
//
// Usage: test_transposed_keys [part of a check's name]

#include "tile_cases.h"

using namespace mixedkv;
using namespace testing;

namespace {

void test_transposed(const std::string &isa, const Kernels &kernels) {
  const Kernels &scalar = kernels_for("scalar");
  for (Format type : {Format::f32, Format::f16, Format::q4_0})
    check(isa + " transpose_keys " + format_name(type), [&] {
      Random random(72);
      for (int dim : {1, 4, 17, 32, 80, 96, 128, 129, 160, 512, 544})
        for (int num_keys = 1; num_keys <= kTokens; ++num_keys) {
          if (type == Format::q4_0 && dim % QK4_0 != 0)
            continue;
          const std::size_t bytes = row_bytes(type, size(dim));
          const std::size_t element = type == Format::f32 ? 4 : 2;
          const Order order = kOrders[(num_keys + dim) % 3];
          const std::size_t stride = bytes + (order == Order::dense ? 0 : 3 * element);
          const int stored = order == Order::indexed ? 2 * num_keys + 1 : num_keys;
          std::vector<std::int32_t> index;
          for (int j = 0; order == Order::indexed && j < num_keys; ++j)
            index.push_back(between(random, 0, stored - 1));
          // The allocation ends with the last row's last byte.
          Input<char> rows(stride * size(stored - 1) + bytes, element * size(num_keys % 4));
          std::memset(rows.data(), 0xff, rows.size());
          std::vector<float> exact(size(stored * dim));
          for (int j = 0; j < stored; ++j) {
            float *values = exact.data() + j * dim;
            char *row = rows.data() + stride * size(j);
            for (int i = 0; i < dim; ++i)
              values[i] = normal(random);
            if (type == Format::f32) {
              std::memcpy(row, values, bytes);
            } else if (type == Format::f16) {
              scalar.of(Format::f16).from_f32(values, reinterpret_cast<f16_t *>(row), size(dim));
              scalar.of(Format::f16).to_f32(reinterpret_cast<f16_t *>(row), values, size(dim));
            } else {
              block_q4_0 *blocks = reinterpret_cast<block_q4_0 *>(row);
              scalar.of(Format::q4_0).from_f32(values, blocks, size(dim));
              scalar.of(Format::q4_0).to_f32(blocks, values, size(dim));
            }
          }
          const Rows k = {rows.data(), static_cast<std::ptrdiff_t>(stride),
                          index.empty() ? nullptr : index.data()};
          Output<float> kt(size(dim * kTokens), size(num_keys % 4));
          std::fill(kt.data(), kt.data() + kt.size(), kNan);
          kernels.of(type).transpose_keys(&k, num_keys, dim, kt.data());
          EXPECT(kt.guards_intact(), "guards, keys %d dim %d", num_keys, dim);
          for (int i = 0; i < dim; ++i)
            for (int j = 0; j < kTokens; ++j) {
              const int row = index.empty() || j >= num_keys ? j : index[size(j)];
              const float want = j < num_keys ? exact[size(row * dim + i)] : 0.0f;
              const float got = kt[size(i * kTokens + j)];
              EXPECT(got == want, "keys %d dim %d: key %d dim %d: %.9g, not %.9g", num_keys, dim, j,
                     i, static_cast<double>(got), static_cast<double>(want));
            }
        }
    });
  const auto run = [&](Random &random, int num_rows, int num_tiles, int dim) {
    const int num_keys = num_tiles * kTokens;
    Input<float> kt(size(num_keys * dim), size(between(random, 0, 3)));
    for (std::size_t i = 0; i < kt.size(); ++i)
      kt[i] = normal(random);
    FloatRows q(random, num_rows, dim, between(random, 0, 5));
    for (int r = 0; r < num_rows; ++r)
      for (int i = 0; i < dim; ++i)
        q.row(r)[i] = normal(random);
    const int bad_row = between(random, -1, num_rows - 1),
              bad_key = between(random, -1, num_keys - 1);
    if (bad_row >= 0)
      q.row(bad_row)[between(random, 0, dim - 1)] = kNan;
    if (bad_key >= 0)
      kt[size((bad_key / kTokens * dim + between(random, 0, dim - 1)) * kTokens +
              bad_key % kTokens)] = kNan;
    OutputRows scores(random, num_rows, num_keys, between(random, 0, 5));
    kernels.qk_transposed(q.row(0), q.ld, num_rows, kt.data(), num_tiles, dim, scores.row(0),
                          scores.ld);
    EXPECT(scores.untouched_between(), "guards: rows %d tiles %d dim %d", num_rows, num_tiles, dim);
    std::vector<float> alone(kTokens);
    for (int r = 0; r < num_rows; ++r) {
      for (int j = 0; j < num_keys; ++j) {
        double expected = 0, magnitude = 0;
        for (int i = 0; i < dim; ++i) {
          const double k = kt[size((j / kTokens * dim + i) * kTokens + j % kTokens)];
          expected += q.row(r)[i] * k;
          magnitude += std::fabs(q.row(r)[i] * k);
        }
        const float got = scores.row(r)[j];
        if (r == bad_row || j == bad_key)
          EXPECT(std::isnan(got), "row %d key %d: %g", r, j, static_cast<double>(got));
        else
          EXPECT(std::fabs(got - expected) <= dim * kUlp * magnitude,
                 "rows %d tiles %d dim %d: row %d key %d: %.9g, not %.9g", num_rows, num_tiles, dim,
                 r, j, static_cast<double>(got), expected);
      }
      const int t = between(random, 0, num_tiles - 1);
      kernels.qk_transposed(q.row(r), 0, 1, kt.data() + t * kTokens * dim, 1, dim, alone.data(), 0);
      if (r != bad_row && bad_key / kTokens != t)
        EXPECT(same_bits(alone.data(), scores.row(r) + t * kTokens, alone.size()),
               "rows %d tiles %d dim %d: row %d has other bits than alone", num_rows, num_tiles,
               dim, r);
    }
  };
  check(isa + " qk_transposed", [&] {
    Random random(73);
    for (int dim : {1, 4, 17, 32, 80, 96, 128, 129, 512})
      for (int num_rows = 1; num_rows <= 13; ++num_rows)
        run(random, num_rows, between(random, 1, 6), dim);
    for (int num_tiles = 1; num_tiles <= 10; ++num_tiles)
      for (int num_rows : {1, 9, 32, 33})
        run(random, num_rows, num_tiles, 64);
  });
  check(isa + " qk_transposed without rows or tiles touches nothing", [&] {
    std::vector<float> q(32, 1.0f), out(32, 5.0f), expected = out;
    kernels.qk_transposed(q.data(), 32, 1, nullptr, 0, 32, out.data(), 16);
    kernels.qk_transposed(q.data(), 32, 0, q.data(), 1, 2, out.data(), 16);
    EXPECT(out == expected, "wrote");
  });
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  on_each_isa(test_transposed);
  return summary();
}
