// The Walsh-Hadamard transform of every instruction set: against its matrix in double precision,
// against the scalar one bit for bit, and against itself.
#include "checks.h"

#include "kernels/dispatch.h"
#include "mixedkv/runtime.h"
#include "rows/hadamard.h"

#include <algorithm>
#include <vector>

using namespace mixedkv;
using namespace testing;

namespace {

const std::size_t kSizes[] = {1,   2,   3,   4,   5,   6,   7,   8,   12,  16,   20,   24,  31,
                              32,  33,  40,  48,  64,  80,  96,  112, 127, 128,  160,  192, 200,
                              255, 256, 257, 320, 384, 512, 576, 640, 768, 1024, 2048, 4096};

/// H[i][j] = (-1)^(bits that i and j share) / sqrt(block), of each block.
std::vector<double> by_definition(const float *x, std::size_t n, std::size_t block) {
  std::vector<double> y(n, 0.0);
  for (std::size_t i = 0; i < n; ++i) {
    const std::size_t begin = i / block * block;
    for (std::size_t j = 0; j < block; ++j) {
      bool odd = false;
      for (std::size_t shared = (i - begin) & j; shared != 0; shared &= shared - 1)
        odd = !odd;
      y[i] += (odd ? -1.0 : 1.0) * double{x[begin + j]};
    }
    y[i] /= std::sqrt(static_cast<double>(block));
  }
  return y;
}

double norm(const float *x, std::size_t n) {
  double sum = 0.0;
  for (std::size_t i = 0; i < n; ++i)
    sum += double{x[i]} * double{x[i]};
  return std::sqrt(sum);
}

/// Roundings: the factor's, the product's, and one a stage of the values so far, whose norm stays.
double bound(std::size_t block) {
  double stages = 0.0;
  for (std::size_t h = 1; h < block; h *= 2)
    ++stages;
  return (stages + 2.0) * kUlp;
}

void test_transform(const std::string &isa, const Kernels &kernels, const Kernels &scalar) {
  Random random(7);
  for (const std::size_t n : kSizes)
    for (std::size_t block = 1; n % block == 0; block *= 2)
      for (const std::size_t misalignment : {0, 1}) {
        const std::string name = isa + " hadamard n=" + std::to_string(n) +
                                 " block=" + std::to_string(block) +
                                 " misaligned=" + std::to_string(misalignment);
        check(name, [&] {
          Output<float> x(n, misalignment);
          for (std::size_t i = 0; i < n; ++i)
            x[i] = normal(random) * (i % 7 == 3 ? 20.0f : 1.0f);
          const std::vector<float> before(x.data(), x.data() + n);
          std::vector<float> plain = before;
          kernels.hadamard(x.data(), n, block);
          scalar.hadamard(plain.data(), n, block);
          EXPECT(x.guards_intact(), "writes beyond its row");
          EXPECT(std::memcmp(x.data(), plain.data(), n * sizeof(float)) == 0, "the scalar bits");
          const std::vector<double> want = by_definition(before.data(), n, block);
          double difference = 0.0;
          for (std::size_t i = 0; i < n; ++i)
            difference += std::pow(double{x[i]} - want[i], 2);
          const double limit = bound(block) * norm(before.data(), n);
          EXPECT(std::sqrt(difference) <= limit, "off by %g, limit %g", std::sqrt(difference),
                 limit);
          kernels.hadamard(x.data(), n, block);
          difference = 0.0;
          for (std::size_t i = 0; i < n; ++i)
            difference += std::pow(double{x[i]} - double{before[i]}, 2);
          EXPECT(std::sqrt(difference) <= 2.0 * limit, "not its own inverse: %g",
                 std::sqrt(difference));
        });
      }
  check(isa + " hadamard of zeros, large and odd values", [&] {
    for (const std::size_t n : {8, 16, 64, 128}) {
      std::vector<float> x(n, -0.0f);
      kernels.hadamard(x.data(), n, n);
      EXPECT(std::all_of(x.begin(), x.end(), [](float v) { return v == 0.0f; }), "zeros");
      // Scaled first: no sum on the way is larger than what comes out.
      std::fill(x.begin(), x.end(), 1e37f);
      kernels.hadamard(x.data(), n, n);
      EXPECT(std::fabs(x[0] / (1e37f * std::sqrt(static_cast<float>(n))) - 1.0f) < 1e-6f, "%g",
             static_cast<double>(x[0]));
      x.assign(n, 0.0f);
      x[3] = kInf;
      kernels.hadamard(x.data(), n, n);
      EXPECT(std::none_of(x.begin(), x.end(), [](float v) { return std::isfinite(v); }), "inf");
    }
  });
}

void test_rows() {
  check("blocks that are rotated", [] {
    const std::size_t want[][2] = {{1, 1},   {2, 2},     {45, 1},   {48, 16},   {64, 64},  {80, 16},
                                   {96, 32}, {128, 128}, {192, 64}, {256, 256}, {576, 64}, {65, 1}};
    for (const auto &pair : want)
      EXPECT(hadamard_block(pair[0]) == pair[1], "%zu", pair[0]);
  });
  check("products of rotated rows", [] {
    Random random(3);
    const Hadamard hadamard;
    for (const std::size_t n : {33, 80, 128, 192}) {
      std::vector<float> a(n), b(n);
      double plain = 0.0, rotated = 0.0;
      for (std::size_t i = 0; i < n; ++i) {
        a[i] = normal(random);
        b[i] = normal(random);
        plain += double{a[i]} * double{b[i]};
      }
      hadamard.apply(a.data(), n);
      hadamard.apply(b.data(), n);
      for (std::size_t i = 0; i < n; ++i)
        rotated += double{a[i]} * double{b[i]};
      EXPECT(std::fabs(plain - rotated) < 1e-6 * norm(a.data(), n) * norm(b.data(), n), "n %zu", n);
    }
  });
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  for (const IsaInfo &isa : compiled_isas())
    if (isa.available)
      test_transform(isa.name, kernels_for(isa.name), kernels_for("scalar"));
  test_rows();
  return summary();
}
