// What cold keys are stored less of, and the term that it gives to their logits, against float64.
//
// Usage: test_centers [part of a check's name]

#include "attention/center_terms.h"
#include "checks.h"
#include "kernels/dispatch.h"
#include "mixedkv/convert.h"
#include "rows/key_centers.h"

#include <limits>

using namespace mixedkv;
using namespace testing;

namespace {

constexpr int kWidth = 48;

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

float center_value(const KeyCenters &centers, int layer, int head, std::int64_t page, int i) {
  float value = 0;
  convert_row(Format::f16, centers.of(layer, head, page) + i, Format::f32, &value, 1);
  return value;
}

/// A key's values: of its own, around its head's and layer's.
void key(int layer, int head, std::int64_t cell, float *values) {
  Random random(static_cast<unsigned>(1000 * layer + 100 * head + cell));
  for (int i = 0; i < kWidth; ++i)
    values[i] = static_cast<float>(layer + 3 * head - 2) + normal(random);
}

void test_means() {
  check("a page's center is the mean of those that come first", [] {
    KeyCenters centers(2, 3, kWidth, 300);
    EXPECT(centers.bytes() == size(2 * 3 * 3) * (kWidth * 2 + 1), "got %zu", centers.bytes());
    // 20 keys of page 0 and 30 of page 2, page by page and key by key in turns.
    std::vector<std::int32_t> cells;
    for (int i = 0; i < 30; ++i) {
      cells.push_back(256 + i);
      if (i < 20)
        cells.push_back(5 + i);
    }
    for (const auto &[layer, head] : {std::pair(0, 0), std::pair(1, 2)}) {
      const auto row = [&, l = layer, h = head](std::int64_t i, float *values) {
        key(l, h, cells[size(i)], values);
      };
      centers.choose(layer, head, cells.data(), static_cast<std::int64_t>(cells.size()), row);
      for (std::int64_t page : {0, 2}) {
        const int first = page == 0 ? 5 : 256;
        const int n = page == 0 ? 20 : 30;
        std::vector<double> mean(kWidth);
        std::vector<float> values(kWidth);
        for (int t = 0; t < n; ++t) {
          key(layer, head, first + t, values.data());
          for (int i = 0; i < kWidth; ++i)
            mean[size(i)] += static_cast<double>(values[size(i)]) / n;
        }
        for (int i = 0; i < kWidth; ++i) {
          const double got = static_cast<double>(center_value(centers, layer, head, page, i));
          EXPECT(std::fabs(got - mean[size(i)]) <= 1e-3 * std::fabs(mean[size(i)]) + 1e-6,
                 "page %d, at %d: %g for %g", static_cast<int>(page), i, got, mean[size(i)]);
        }
        values.assign(kWidth, 7.0f);
        centers.subtract(layer, head, first, values.data());
        for (int i = 0; i < kWidth; ++i)
          EXPECT(values[size(i)] == 7.0f - center_value(centers, layer, head, page, i), "at %d", i);
        centers.add(layer, head, first, values.data());
        for (int i = 0; i < kWidth; ++i)
          EXPECT(std::fabs(values[size(i)] - 7.0f) < 1e-6f, "at %d", i);
      }
    }
    EXPECT(center_value(centers, 0, 1, 0, 0) == 0.0f, "another head");
    EXPECT(center_value(centers, 1, 2, 1, 0) == 0.0f, "another page");
  });
  check("a center stays until its page is forgotten", [] {
    KeyCenters centers(1, 2, kWidth, 256);
    float constant = 2.0f;
    const auto row = [&](std::int64_t, float *values) { std::fill_n(values, kWidth, constant); };
    const std::int32_t cells[] = {3, 200};
    for (int head : {0, 1})
      centers.choose(0, head, cells, 2, row);
    constant = 8.0f;
    centers.forget(1);
    for (int head : {0, 1}) {
      centers.choose(0, head, cells, 2, row);
      EXPECT(center_value(centers, 0, head, 0, 9) == 2.0f, "page 0");
      EXPECT(center_value(centers, 0, head, 1, 9) == 8.0f, "page 1");
    }
  });
  check("keys that are not finite don't count, and large ones are bounded", [] {
    KeyCenters centers(1, 1, kWidth, 128);
    const float odd[] = {std::numeric_limits<float>::quiet_NaN(), HUGE_VALF, -HUGE_VALF};
    const auto row = [&](std::int64_t i, float *values) {
      std::fill_n(values, kWidth, static_cast<float>(i));
      if (i < 3)
        values[i * 5] = odd[i];
    };
    const std::int32_t cells[] = {0, 1, 2, 3, 4};
    centers.choose(0, 0, cells, 5, row);
    for (int i = 0; i < kWidth; ++i)
      EXPECT(center_value(centers, 0, 0, 0, i) == 3.5f, "at %d", i);
    centers.forget(0);
    centers.choose(0, 0, cells, 3, row);
    EXPECT(center_value(centers, 0, 0, 0, 1) == 0.0f, "none was finite");
    centers.forget(0);
    centers.choose(0, 0, cells, 5, [](std::int64_t i, float *values) {
      std::fill_n(values, kWidth, i % 2 == 0 ? 3e38f : 2e38f);
    });
    EXPECT(center_value(centers, 0, 0, 0, 1) == 65504.0f, "their sum is infinite");
  });
}

/// All runs of a segment: each logit gains the product of its row with its page's center.
void expect_terms(const std::string &isa, const char *what, std::int64_t first_cell,
                  std::int64_t len, const std::vector<std::int32_t> &index) {
  check(isa + " terms of " + what, [&] {
    const std::int64_t pages = 40;
    Random random(7);
    std::vector<float> centers(size(2 * pages * kWidth));
    for (float &x : centers)
      x = normal(random);
    std::vector<f16_t> halves(centers.size());
    convert_row(Format::f32, centers.data(), Format::f16, halves.data(), halves.size());
    convert_row(Format::f16, halves.data(), Format::f32, centers.data(), halves.size());
    KeySegment segment;
    segment.k_centers = halves.data();
    segment.k_center_head_stride = pages * kWidth;
    segment.first_cell = index.empty() ? first_cell : 0;
    segment.index = index.empty() ? nullptr : index.data();
    segment.len = len;
    for (int rows : {1, 4, 9, 100}) {
      std::vector<float> q(size(rows * kWidth));
      for (float &x : q)
        x = normal(random);
      CenterTerms terms(active_kernels(), 1, q.data(), rows, kWidth);
      KeyRun run(1, kChunkKeys);
      const std::size_t ld = kChunkKeys + 5;
      for (std::int64_t begin = 0; begin < len; begin += run.size()) {
        run.take(segment, begin, len);
        std::vector<float> x(size(rows) * ld, 2.0f);
        terms.add(run, x.data(), ld);
        for (int r = 0; r < rows; ++r) {
          for (std::size_t j = 0; j < ld; ++j) {
            double want = 2.0;
            if (j < size(run.size())) {
              const std::int64_t k = begin + static_cast<std::int64_t>(j);
              const std::int64_t cell = index.empty() ? first_cell + k : index[size(k)];
              const float *center = centers.data() + (pages + cell / kCenterCells) * kWidth;
              for (int i = 0; i < kWidth; ++i)
                want += static_cast<double>(q[size(r * kWidth + i)]) * center[i];
            }
            const double got = static_cast<double>(x[size(r) * ld + j]);
            EXPECT(std::fabs(got - want) < 2e-5, "row %d, key %d: %g for %g", r,
                   static_cast<int>(begin) + static_cast<int>(j), got, want);
          }
        }
      }
    }
  });
}

void test_terms(const std::string &isa) {
  expect_terms(isa, "an unbroken run", 0, 2000, {});
  expect_terms(isa, "a run that begins within a page", 200, 1777, {});
  expect_terms(isa, "one key", 4000, 1, {});
  std::vector<std::int32_t> gaps, sparse, odd;
  for (std::int32_t cell = 3; cell < 2000; ++cell) {
    if (cell % 7 != 0 && (cell < 500 || cell > 900))
      gaps.push_back(cell);
    if (cell % 61 == 0)
      sparse.push_back(cell);
    if (cell % 128 == 127 || cell % 128 == 0)
      odd.push_back(cell);
  }
  for (const auto &[what, index] :
       {std::pair("an index with gaps", &gaps),
        std::pair("a sparse index, more pages than are had at a time", &sparse),
        std::pair("first and last cells of pages", &odd)})
    expect_terms(isa, what, 0, static_cast<std::int64_t>(index->size()), *index);
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  test_means();
  for (const std::string &isa : available_isas()) {
    select_isa(isa);
    test_terms(isa);
  }
  return summary();
}
