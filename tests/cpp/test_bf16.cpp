// Arithmetic in bf16, kernel by kernel, of every instruction set that has it: rounding and panels
// bit for bit against the scalar table (and that against definitions), sums against float64 with
// bounds that follow from the number of roundings. Lengths run around the width of a vector.
//
// Usage: test_bf16 [part of a check's name]

#include "checks.h"
#include "formats/tile_layout.h"
#include "kernels/dispatch.h"

using namespace mixedkv;
using namespace testing;

namespace {

constexpr int kColumns = kPanelColumns;
const int kDims[] = {1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 80, 96, 128, 130, 257, 512};

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

float value_of_bf16(bf16_t x) { return float_of(static_cast<std::uint32_t>(x.bits) << 16); }

/// Equal, or both NaN; zeros of either sign are one.
bool same(bf16_t a, bf16_t b) {
  const float x = value_of_bf16(a), y = value_of_bf16(b);
  return x == y || (std::isnan(x) && std::isnan(y));
}

/// Numbers of all kinds, none of them so small that it may count as nothing.
float any_number(Random &random) {
  const int kind = between(random, 0, 20);
  return kind == 0   ? 0.0f
         : kind == 1 ? std::ldexp(normal(random), between(random, -60, 60))
         : kind == 2 ? 3.0e38f
                     : normal(random);
}

// --- rounding ------------------------------------------------------------------------------------

void test_scalar_rounding(const Bf16Kernels &scalar) {
  check("scalar round_row rounds to nearest even around every bf16", [&] {
    const auto rounded = [&](float x) {
      bf16_t y[2];
      scalar.round_row(&x, y, 1);
      EXPECT(y[1].bits == 0, "partner of the last value");
      return y[0].bits;
    };
    for (unsigned h = 0x80; h < 0x7f80; ++h) {
      const float here = value_of_bf16({static_cast<std::uint16_t>(h)});
      const float middle = float_of(h << 16 | 0x8000u);
      EXPECT(rounded(here) == h && rounded(-here) == (h | 0x8000u), "bf16 %04x", h);
      EXPECT(rounded(middle) == (h % 2 ? h + 1 : h), "above %04x", h);
      EXPECT(rounded(std::nextafter(middle, 0.0f)) == h, "above %04x", h);
      EXPECT(rounded(std::nextafter(middle, kInf)) == h + 1, "above %04x", h);
    }
    EXPECT(rounded(kInf) == 0x7f80 && rounded(-kInf) == 0xff80, "infinity");
    EXPECT(std::isnan(value_of_bf16({rounded(kNan)})), "NaN");
    EXPECT(std::isnan(value_of_bf16({rounded(float_of(0x7f800001u))})), "signalling NaN");
  });
}

void test_rounding(const std::string &isa, const Bf16Kernels &kernels, const Bf16Kernels &scalar) {
  check(isa + " round_row", [&] {
    Random random(1);
    for (int n : kDims)
      for (std::size_t shift : {0, 1, 3}) {
        Input<float> x(size(n), shift);
        for (int i = 0; i < n; ++i)
          x[size(i)] = any_number(random);
        x[random() % size(n)] = random() % 2 ? kNan : -kInf;
        Output<bf16_t> y(size(n + n % 2), shift), want(size(n + n % 2), 0);
        kernels.round_row(x.data(), y.data(), size(n));
        scalar.round_row(x.data(), want.data(), size(n));
        for (int i = 0; i < n + n % 2; ++i)
          EXPECT(same(y[size(i)], want[size(i)]), "n %d: %d: %04x, not %04x", n, i, y[size(i)],
                 want[size(i)]);
        EXPECT(y.guards_intact(), "n %d", n);
      }
  });
  check(isa + " all_finite finds every one that is not", [&] {
    for (int n : kDims) {
      Input<bf16_t> x(size(n), 1);
      std::fill_n(x.data(), n, bf16_t{0xff7f}); // the largest
      EXPECT(kernels.all_finite(x.data(), size(n)), "n %d", n);
      for (int i = 0; i < n; ++i)
        for (bf16_t bad : {bf16_t{0x7f80}, bf16_t{0xff80}, bf16_t{0x7fc0}, bf16_t{0xff81}}) {
          const bf16_t good = x[size(i)];
          x[size(i)] = bad;
          EXPECT(!kernels.all_finite(x.data(), size(n)), "n %d: %04x at %d", n, bad, i);
          x[size(i)] = good;
        }
    }
  });
}

void test_exp_sum(const std::string &isa, const Bf16Kernels &kernels) {
  check(isa + " exp_sum", [&] {
    Random random(2);
    for (int n = 1; n <= 140; ++n)
      for (std::size_t shift : {0, 1}) {
        const float m = 10.0f * normal(random);
        Input<float> x(size(n), shift);
        for (int i = 0; i < n; ++i)
          x[size(i)] = m - std::fabs(std::ldexp(normal(random), between(random, -10, 6)));
        x[0] = m;
        if (n > 3)
          x[size(between(random, 1, n - 1))] = -kInf;
        const int padded = (n + 31) / 32 * 32;
        Output<bf16_t> p(size(padded), shift);
        const float sum = kernels.exp_sum(x.data(), p.data(), size(n), m);
        double want = 0;
        for (int i = 0; i < padded; ++i) {
          const double got = value_of_bf16(p[size(i)]);
          if (i >= n) {
            EXPECT(p[size(i)].bits == 0 || p[size(i)].bits == 0xa5a5, "n %d: %d is not padding", n,
                   i);
            continue;
          }
          want += got;
          const double exact = std::exp(static_cast<double>(x[size(i)]) - static_cast<double>(m));
          EXPECT(std::fabs(got - exact) <= (1.0 / 256 + 1e-5) * exact + 1e-37, "n %d: %g, not %g",
                 n, got, exact);
        }
        EXPECT(p[0].bits == 0x3f80, "exp(0) is %04x", p[0]);
        EXPECT(std::fabs(sum - want) <= n * kUlp * want, "n %d: sum %g, not %g", n,
               static_cast<double>(sum), want);
        EXPECT(p.guards_intact(), "n %d", n);
      }
  });
  check(isa + " exp_sum of what is not a number", [&] {
    for (int n : {1, 7, 16, 33, 64})
      for (int bad = 0; bad < n; ++bad) {
        std::vector<float> x(size(n), -1.0f);
        std::vector<bf16_t> p(size(n + 32));
        x[size(bad)] = kNan;
        EXPECT(std::isnan(kernels.exp_sum(x.data(), p.data(), size(n), 0.0f)), "n %d", n);
        EXPECT(std::isnan(value_of_bf16(p[size(bad)])), "n %d: %d", n, bad);
        x[size(bad)] = -kInf;
        EXPECT(std::isfinite(kernels.exp_sum(x.data(), p.data(), size(n), 0.0f)), "n %d", n);
        EXPECT(p[size(bad)].bits == 0, "n %d: %d", n, bad);
      }
  });
}

// --- panels --------------------------------------------------------------------------------------

/// num_rows rows of n values in one of the types, `gap` bytes between them, each with some numbers
/// that are not finite.
struct TypedRows {
  std::vector<char> bytes;
  std::vector<std::int32_t> index;
  Format type;
  std::ptrdiff_t stride;

  TypedRows(Random &random, Format type_, int num_rows, int n, int gap)
      : type(type_), stride(static_cast<std::ptrdiff_t>(row_bytes(type_, size(n))) + gap) {
    bytes.resize(size(num_rows * stride));
    for (int r = 0; r < num_rows; ++r) {
      index.push_back(num_rows - 1 - r);
      char *row = bytes.data() + r * stride;
      if (!format_info(type).plain()) { // an f16 d, then codes
        const std::size_t block = size(format_info(type).block_bytes);
        for (std::size_t b = 0; b < row_bytes(type, size(n)); b += block) {
          for (std::size_t i = 2; i < block; ++i)
            row[b + i] = static_cast<char>(random());
          const f16_t d = random() % 20 ? static_cast<f16_t>(0x2000 + random() % 0x2000)
                                        : static_cast<f16_t>(0x7e00);
          std::memcpy(row + b, &d, sizeof d);
        }
        continue;
      }
      for (int i = 0; i < n; ++i) {
        const float x = random() % 50 ? any_number(random) : random() % 2 ? kNan : kInf;
        if (type == Format::f32) {
          std::memcpy(row + i * 4, &x, 4);
        } else {
          f16_t half = static_cast<f16_t>(random());
          if (type == Format::bf16 && (half & 0x7f80) == 0)
            half |= 0x0080; // panels may take what is below the smallest normal number for zero
          std::memcpy(row + i * 2, &half, 2);
        }
      }
    }
  }
  Rows rows(bool indexed) const { return {bytes.data(), stride, indexed ? index.data() : nullptr}; }
};

void expect_same(Output<bf16_t> &got, Output<bf16_t> &want, const char *what, int n) {
  for (std::size_t i = 0; i < got.size(); ++i)
    EXPECT(same(got[i], want[i]), "%s, dim %d: number %d is %04x, not %04x", what, n,
           static_cast<int>(i), got[i].bits, want[i].bits);
  EXPECT(got.guards_intact(), "%s, dim %d", what, n);
}

void test_panels(const std::string &isa, const Kernels &kernels, const Kernels &scalar) {
  for (int number = 0; number < kNumFormats; ++number) {
    const Format type = static_cast<Format>(number);
    if (kernels.of(type).key_panel == nullptr)
      continue;
    check(isa + " panels of keys, " + format_name(type), [&] {
      Random random(3);
      for (int dim : kDims) {
        if (!format_info(type).holds(dim))
          continue;
        for (int num_keys = 1; num_keys <= kColumns; ++num_keys) {
          const int gap = (type == Format::f32 ? 4 : 2) * between(random, 0, 2);
          const TypedRows keys(random, type, num_keys, dim, gap);
          const Rows rows = keys.rows(num_keys % 2);
          const std::size_t n = panel_size(size((dim + 1) / 2));
          Output<bf16_t> got(n, 1), want(n, 0);
          kernels.of(type).key_panel(&rows, num_keys, dim, got.data());
          scalar.of(type).key_panel(&rows, num_keys, dim, want.data());
          expect_same(got, want, "keys", dim);
        }
      }
    });
    check(isa + " panels of values, " + format_name(type), [&] {
      Random random(4);
      for (int dim : kDims) {
        if (!format_info(type).holds(dim))
          continue;
        for (int num_keys : {1, 2, 3, 7, 16, 17, 33}) {
          const TypedRows values(random, type, num_keys, dim, 4 * between(random, 0, 2));
          const Rows rows = values.rows(num_keys % 2 == 0);
          const std::size_t ld = panel_size(size((num_keys + 1) / 2));
          const std::size_t n = size((dim + kColumns - 1) / kColumns) * ld;
          Output<bf16_t> got(n, 1), want(n, 0);
          kernels.of(type).value_panels(&rows, num_keys, dim, got.data(), ld);
          scalar.of(type).value_panels(&rows, num_keys, dim, want.data(), ld);
          expect_same(got, want, "values", dim);
        }
      }
    });
  }
  check(isa + " panels of packed tiles", [&] {
    Random random(5);
    for (int dim : {32, 64, 96, 128, 512}) {
      std::vector<unsigned char> tile(tile_bytes(Format::q4_0, size(dim)));
      const TypedRows rows(random, Format::q4_0, kColumns, dim, 0);
      const auto *blocks = reinterpret_cast<const block_q4_0 *>(rows.bytes.data());
      const Rows all = rows.rows(false);
      for (int token = 0; token < kColumns; ++token)
        tile_layout(Format::q4_0)
            ->put_keys(blocks + token * dim / 32, 0, dim / 32, dim / 32, tile.data(), token);
      const std::size_t n = panel_size(size(dim / 2));
      Output<bf16_t> got(n, 1), want(n, 0);
      kernels.tiles_of(Format::q4_0)->key_panel(tile.data(), dim, got.data());
      scalar.of(Format::q4_0).key_panel(&all, kColumns, dim, want.data());
      expect_same(got, want, "packed keys", dim);

      for (int token = 0; token < kColumns; ++token)
        tile_layout(Format::q4_0)
            ->put_values(blocks + token * dim / 32, 0, dim / 32, dim / 32, tile.data(), token);
      const std::size_t ld = panel_size(kColumns / 2);
      Output<bf16_t> got_values(size(dim / kColumns) * ld, 1);
      Output<bf16_t> want_values(size(dim / kColumns) * ld, 0);
      kernels.tiles_of(Format::q4_0)->value_panels(tile.data(), dim, got_values.data(), ld);
      scalar.of(Format::q4_0).value_panels(&all, kColumns, dim, want_values.data(), ld);
      expect_same(got_values, want_values, "packed values", dim);
    }
  });
}

// --- products ------------------------------------------------------------------------------------

void check_product(const Bf16Kernels &kernels, Random &random, int num_rows, int num_pairs,
                   int num_columns, bool add) {
  const int num_panels = (num_columns + kColumns - 1) / kColumns;
  const std::size_t ld_a = size(2 * num_pairs + 2 * between(random, 0, 3));
  const std::size_t ld_panel = panel_size(size(num_pairs)) + size(2 * between(random, 0, 3));
  const std::size_t ld_c = size(num_columns + between(random, 0, 5));
  Input<bf16_t> a(size(num_rows) * ld_a, 1), b(size(num_panels) * ld_panel, 1);
  const auto fill = [&](Input<bf16_t> &x) {
    for (std::size_t i = 0; i < x.size(); ++i)
      x[i] = {static_cast<std::uint16_t>(bits_of(normal(random)) >> 16)};
  };
  fill(a);
  fill(b);
  Output<float> c(size(num_rows) * ld_c, 1);
  std::vector<float> before(c.size());
  for (std::size_t i = 0; i < c.size(); ++i)
    c[i] = before[i] = normal(random);
  kernels.product(a.data(), ld_a, num_rows, b.data(), ld_panel, num_pairs, num_columns, add,
                  c.data(), ld_c);
  EXPECT(c.guards_intact(), "rows %d, pairs %d, columns %d", num_rows, num_pairs, num_columns);
  for (int r = 0; r < num_rows; ++r) {
    for (int j = 0; j < static_cast<int>(ld_c); ++j) {
      const std::size_t at = size(r) * ld_c + size(j);
      if (j >= num_columns) {
        EXPECT(c[at] == before[at], "row %d: column %d is beyond", r, j);
        continue;
      }
      double want = add ? static_cast<double>(before[at]) : 0.0;
      double magnitude = std::fabs(want);
      for (int i = 0; i < 2 * num_pairs; ++i) {
        const double product =
            static_cast<double>(value_of_bf16(a[size(r) * ld_a + size(i)])) *
            value_of_bf16(b[size(j / kColumns) * ld_panel +
                            size(i / 2 * 2 * kColumns + j % kColumns * 2 + i % 2)]);
        want += product;
        magnitude += std::fabs(product);
      }
      // Some instructions round to odd, or twice a pair: two of kUlp a product.
      EXPECT(std::fabs(c[at] - want) <= 2 * (2 * num_pairs + 1) * kUlp * magnitude,
             "rows %d, pairs %d, columns %d: [%d, %d] is %g, not %g", num_rows, num_pairs,
             num_columns, r, j, static_cast<double>(c[at]), want);
    }
    // A row alone gets the same bits.
    std::vector<float> alone(before.begin() + static_cast<std::ptrdiff_t>(size(r) * ld_c),
                             before.begin() +
                                 static_cast<std::ptrdiff_t>(size(r) * ld_c + size(num_columns)));
    kernels.product(a.data() + size(r) * ld_a, ld_a, 1, b.data(), ld_panel, num_pairs, num_columns,
                    add, alone.data(), ld_c);
    EXPECT(std::memcmp(alone.data(), c.data() + size(r) * ld_c, alone.size() * 4) == 0,
           "rows %d: row %d alone has other bits", num_rows, r);
  }
}

void test_product(const std::string &isa, const Bf16Kernels &kernels) {
  check(isa + " product", [&] {
    Random random(6);
    for (int num_rows = 1; num_rows <= 26; ++num_rows)
      for (int num_columns : {1, 3, 7, 8, 15, 16, 17, 48, 64, 65, 80, 130})
        check_product(kernels, random, num_rows, between(random, 1, 20), num_columns, random() % 2);
    for (int num_pairs : {1, 2, 3, 7, 8, 16, 17, 40, 64, 256})
      for (bool add : {false, true})
        check_product(kernels, random, 13, num_pairs, 144, add);
  });
  check(isa + " product without rows or columns touches nothing", [&] {
    const std::vector<bf16_t> a(64, bf16_t{0x3f80});
    std::vector<float> c(64, 5.0f);
    const std::vector<float> expected = c;
    kernels.product(a.data(), 2, 0, a.data(), 32, 1, 16, true, c.data(), 16);
    kernels.product(a.data(), 2, 2, a.data(), 32, 1, 0, true, c.data(), 16);
    EXPECT(c == expected, "wrote");
  });
  check(isa + " product NaN and infinity reach their row and column alone", [&] {
    Random random(7);
    for (bf16_t bad : {bf16_t{0x7fc0}, bf16_t{0x7f80}, bf16_t{0xff80}})
      for (int where = 0; where < 16; ++where) {
        std::vector<bf16_t> a(9 * 16, bf16_t{0x3f80}), b(5 * panel_size(8), bf16_t{0x3f80});
        std::vector<float> c(9 * 80);
        const int row = between(random, 0, 8), column = between(random, 0, 79);
        if (where % 2)
          a[size(row * 16 + where)] = bad;
        else
          b[size(column / 16) * panel_size(8) +
            size(where / 2 * 32 + column % 16 * 2 + where % 2)] = bad;
        kernels.product(a.data(), 16, 9, b.data(), panel_size(8), 8, 80, false, c.data(), 80);
        for (int r = 0; r < 9; ++r)
          for (int j = 0; j < 80; ++j) {
            const bool reached = where % 2 ? r == row : j == column;
            EXPECT(std::isfinite(c[size(r * 80 + j)]) != reached, "row %d, column %d", r, j);
          }
      }
  });
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  const Bf16Kernels &scalar = *kernels_for("scalar").bf16;
  test_scalar_rounding(scalar);
  for (const IsaInfo &isa : compiled_isas()) {
    if (!isa.has_bf16)
      continue;
    if (!isa.available) {
      std::printf("SKIP %s: needs %s, which this machine lacks\n", isa.name, isa.requires_);
      continue;
    }
    const Bf16Kernels &kernels = *kernels_for(isa.name).bf16;
    test_rounding(isa.name, kernels, scalar);
    test_exp_sum(isa.name, kernels);
    test_panels(isa.name, kernels_for(isa.name), kernels_for("scalar"));
    test_product(isa.name, kernels);
  }
  return summary();
}
