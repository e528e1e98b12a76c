// Kernels over one row of scores - its largest, exponentials and their sum, soft cap, scaling - of
// every instruction set that this machine can run, against float64.
//
// Usage: test_scores [part of a check's name]

#include "kernel_cases.h"

using namespace mixedkv;
using namespace testing;

namespace {

void test_scores(const std::string &isa, const Kernels &kernels) {
  check(isa + " row_max", [&] {
    Random random(21);
    for (std::size_t n : lengths())
      for (std::size_t misalignment : {0, 1, 2, 3}) {
        Input<float> x(n, misalignment);
        for (std::size_t i = 0; i < n; ++i)
          x[i] = normal(random) - 20.0f;
        const std::size_t stop = std::min<std::size_t>(n, 40);
        for (std::size_t i = 0; i < stop; ++i) { // the largest in every place
          const std::size_t where = i % 2 ? n - 1 - i : i;
          const float kept = x[where];
          x[where] = -1.0f;
          EXPECT(kernels.row_max(x.data(), n) == -1.0f, "n %zu, at %zu", n, where);
          x[where] = kNan;
          float largest = -kInf;
          for (std::size_t j = 0; j < n; ++j)
            if (x[j] > largest)
              largest = x[j];
          const float got = kernels.row_max(x.data(), n);
          EXPECT(!(got > largest), "n %zu with NaN: %g", n, static_cast<double>(got));
          x[where] = kept;
        }
        std::fill(x.data(), x.data() + n, -kInf);
        EXPECT(kernels.row_max(x.data(), n) == -kInf, "n %zu, all -inf", n);
      }
  });

  /// Runs exp_sum over values and checks each result and the sum.
  const auto check_exp = [&](const std::vector<float> &values, float m, std::size_t misalignment) {
    Output<float> x(values.size(), misalignment);
    std::copy(values.begin(), values.end(), x.data());
    const float sum = kernels.exp_sum(x.data(), x.size(), m);
    EXPECT(x.guards_intact(), "guards, n %zu", values.size());
    double exact_sum = 0;
    for (std::size_t i = 0; i < values.size(); ++i) {
      const double exact = std::exp(static_cast<double>(values[i]) - static_cast<double>(m));
      exact_sum += exact;
      if (exact >= FLT_MIN)
        EXPECT(std::fabs(x[i] - exact) <= 3e-7 * exact, "exp(%.9g - %.9g) = %.9g, not %.9g",
               static_cast<double>(values[i]), static_cast<double>(m), static_cast<double>(x[i]),
               exact);
      else
        EXPECT(x[i] >= 0 && x[i] <= FLT_MIN, "exp(%.9g - %.9g) = %.9g",
               static_cast<double>(values[i]), static_cast<double>(m), static_cast<double>(x[i]));
      if (values[i] == -kInf)
        EXPECT(bits_of(x[i]) == 0, "exp(-inf) is %g", static_cast<double>(x[i]));
    }
    const double n = static_cast<double>(values.size());
    EXPECT(std::fabs(sum - exact_sum) <= (n * kUlp + 3e-7) * exact_sum + n * FLT_MIN,
           "n %zu: sum %.9g, not %.9g", values.size(), static_cast<double>(sum), exact_sum);
  };
  check(isa + " exp_sum over the whole range", [&] {
    for (float m : {0.0f, 1.0f, -3.7f, 55.5f, -1000.0f, 4096.3f}) {
      std::vector<float> values = {m, -kInf, -FLT_MAX};
      for (int i = 0; i < 30000; ++i)
        values.push_back(std::min(m, m - 90.0f * static_cast<float>(i) / 30000.0f));
      for (int i = 0; i < 2000; ++i)
        values.push_back(std::min(m, m - std::ldexp(1.0f, -i / 50) * 0.7f));
      check_exp(values, m, 0);
    }
    // Around the smallest normal result, one float after the other.
    std::vector<float> values;
    for (std::uint32_t bits = bits_of(-87.3f); bits <= bits_of(-87.4f); ++bits)
      values.push_back(float_of(bits));
    check_exp(values, 0.0f, 0);
  });
  check(isa + " exp_sum rows of all lengths, misaligned", [&] {
    Random random(22);
    for (std::size_t n : lengths())
      for (std::size_t misalignment : {0, 1, 2, 3}) {
        std::vector<float> values(n);
        for (float &value : values)
          value = between(random, 0, 9) == 0 ? -kInf : 4.0f * normal(random);
        check_exp(values, *std::max_element(values.begin(), values.end()) == -kInf ? 1.0f : 20.0f,
                  misalignment);
      }
  });
  check(isa + " exp_sum shows NaN, and -inf alone gives 0", [&] {
    for (std::size_t n : lengths())
      for (std::size_t where : {std::size_t(0), n / 2, n - 1}) {
        std::vector<float> x(n, -kInf);
        EXPECT(bits_of(kernels.exp_sum(x.data(), n, 0.0f)) == 0, "n %zu", n);
        x.assign(n, -kInf);
        x[where] = kNan;
        EXPECT(std::isnan(kernels.exp_sum(x.data(), n, 0.0f)), "n %zu, at %zu", n, where);
        EXPECT(std::isnan(x[where]), "n %zu, at %zu", n, where);
      }
  });
  check(isa + " soft_cap", [&] {
    Random random(23);
    for (float cap : {1.0f, 30.0f, 50.0f, 0.37f}) {
      std::vector<float> values = {0.0f, -0.0f, FLT_MIN, -FLT_MIN, 1e30f, -1e30f, FLT_MAX};
      for (int i = 0; i < 20000; ++i) {
        values.push_back(cap * 12.0f * (static_cast<float>(i) / 10000.0f - 1.0f));
        values.push_back(normal(random) * std::ldexp(cap, between(random, -60, 4)));
      }
      for (std::size_t i = 0; i < 400; ++i) // both sides of where formulas change
        values.push_back(float_of(bits_of(0.625f * cap) - 200 + static_cast<std::uint32_t>(i)));
      Output<float> x(values.size(), 1);
      std::copy(values.begin(), values.end(), x.data());
      kernels.soft_cap(x.data(), x.size(), cap);
      EXPECT(x.guards_intact(), "guards");
      for (std::size_t i = 0; i < values.size(); ++i) {
        const double exact = cap * std::tanh(static_cast<double>(values[i]) / cap);
        EXPECT(std::fabs(x[i] - exact) <= 1e-6 * std::fabs(exact) &&
                   std::signbit(x[i]) == std::signbit(values[i]),
               "cap %g: %.9g gives %.9g, not %.9g", static_cast<double>(cap),
               static_cast<double>(values[i]), static_cast<double>(x[i]), exact);
      }
      float ends[] = {kInf, -kInf, kNan};
      kernels.soft_cap(ends, 3, cap);
      EXPECT(ends[0] == cap && ends[1] == -cap && std::isnan(ends[2]), "infinities and NaN");
    }
    for (std::size_t n : lengths()) {
      Output<float> x(n, 1);
      std::fill(x.data(), x.data() + n, 2.0f);
      kernels.soft_cap(x.data(), n, 2.0f);
      EXPECT(x.guards_intact(), "guards, n %zu", n);
      for (std::size_t i = 0; i < n; ++i)
        EXPECT(bits_of(x[i]) == bits_of(x[0]) && std::fabs(x[i] - 1.5231883f) < 1e-5f, "n %zu", n);
    }
  });
  check(isa + " add_constants", [&] {
    Random random(25);
    for (int n : {0, 1, 5, 16, 17, 64, 100, 128})
      for (int rows : {1, 3, 9}) {
        const std::size_t ld = 130;
        Output<float> x(static_cast<std::size_t>(rows) * ld, 1);
        std::vector<float> before(static_cast<std::size_t>(rows) * ld);
        std::vector<float> c(static_cast<std::size_t>(rows) * 8);
        for (std::size_t i = 0; i < before.size(); ++i)
          before[i] = x[i] = normal(random);
        for (float &constant : c)
          constant = normal(random);
        kernels.add_constants(c.data(), 8, rows, x.data(), ld, n);
        for (std::size_t i = 0; i < before.size(); ++i) {
          const float added = static_cast<int>(i % ld) < n ? c[i / ld * 8] : 0.0f;
          EXPECT(x[i] == before[i] + added, "n %d, rows %d, at %zu", n, rows, i);
        }
        EXPECT(x.guards_intact(), "guards, n %d", n);
      }
  });
  check(isa + " scale and axpy", [&] {
    Random random(24);
    for (std::size_t n : lengths())
      for (std::size_t misalignment : {0, 1, 2, 3}) {
        Input<float> x(n, (misalignment + 1) % 4);
        Output<float> y(n, misalignment);
        std::vector<float> before(n);
        for (std::size_t i = 0; i < n; ++i) {
          x[i] = normal(random);
          before[i] = y[i] = normal(random);
        }
        kernels.scale(y.data(), n, 1.7f);
        for (std::size_t i = 0; i < n; ++i) {
          EXPECT(y[i] == before[i] * 1.7f, "scale, n %zu, at %zu", n, i);
          y[i] = before[i];
        }
        kernels.axpy(-0.3f, x.data(), y.data(), n);
        for (std::size_t i = 0; i < n; ++i) {
          const double product = static_cast<double>(-0.3f) * x[i];
          EXPECT(std::fabs(y[i] - (before[i] + product)) <=
                     2 * kUlp * (std::fabs(before[i]) + std::fabs(product)),
                 "axpy, n %zu, at %zu", n, i);
        }
        EXPECT(y.guards_intact(), "guards, n %zu", n);
      }
  });
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  on_each_isa(test_scores);
  return summary();
}
