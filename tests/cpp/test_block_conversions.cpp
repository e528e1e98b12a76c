// Kernels that convert blocks of every format that has them, of every instruction set that this
// machine can run: against the scalar table bit for bit, and the scalar table against ggml's
// definitions. Guard bytes and ends of allocations as in test_conversions.cpp.
//
// Usage: test_block_conversions [part of a check's name]

#include "adversarial_blocks.h"
#include "kernel_cases.h"

#include <type_traits>

using namespace mixedkv;
using namespace testing;

namespace {

// --- the scalar table against definitions -----------------------------------------------------

/// quantize_row_q4_0_ref as its definition says, one step at a time.
block_q4_0 quantize_by_definition(const float *x, const Kernels &scalar) {
  block_q4_0 block;
  float largest = 0.0f, max = 0.0f;
  for (int i = 0; i < 32; ++i) {
    if (!std::isfinite(x[i])) {
      block.d = 0x7e00;
      std::memset(block.qs, 0, sizeof block.qs);
      return block;
    }
    if (std::fabs(x[i]) > largest) {
      largest = std::fabs(x[i]);
      max = x[i];
    }
  }
  const float d = max / -8.0f;
  const float id = d != 0.0f && std::isfinite(1.0f / d) ? 1.0f / d : 0.0f;
  scalar.of(Format::f16).from_f32(&d, &block.d, 1);
  int q[32];
  for (int i = 0; i < 32; ++i) {
    volatile float product = x[i] * id; // volatile: rounded, and not contracted into an FMA
    volatile float sum = product + 8.5f;
    q[i] = std::min(15, static_cast<int>(sum));
  }
  for (int i = 0; i < 16; ++i)
    block.qs[i] = static_cast<std::uint8_t>(q[i] | q[i + 16] << 4);
  return block;
}

/// quantize_row_q8_0_ref as its definition says, one step at a time.
block_q8_0 quantize_q8_0_by_definition(const float *x, const Kernels &scalar) {
  block_q8_0 block;
  std::memset(&block, 0, sizeof block);
  float largest = 0.0f;
  for (int i = 0; i < 32; ++i) {
    if (!std::isfinite(x[i])) {
      block.d = 0x7e00;
      return block;
    }
    largest = std::max(largest, std::fabs(x[i]));
  }
  const float d = largest / 127;
  const float id = d != 0.0f && std::isfinite(1.0f / d) ? 1.0f / d : 0.0f;
  scalar.of(Format::f16).from_f32(&d, &block.d, 1);
  for (int i = 0; i < 32; ++i) {
    volatile float product = x[i] * id; // volatile: rounded to f32
    // As a double, a half more or less is exact: the nearest integer, halves away from zero.
    const double rounded = std::floor(std::fabs(static_cast<double>(product)) + 0.5);
    block.qs[i] = static_cast<std::int8_t>(product < 0.0f ? -rounded : rounded);
  }
  return block;
}

/// quantize_row_iq4_nl_ref as ggml has it, one step at a time.
block_iq4_nl quantize_iq4_nl_by_definition(const float *x, const Kernels &scalar) {
  const auto best_index = [](float value) { // best_index_int8
    if (value <= static_cast<float>(kLevels[0]))
      return 0;
    if (value >= static_cast<float>(kLevels[15]))
      return 15;
    int low = 0, high = 15;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (value < static_cast<float>(kLevels[middle]) ? high : low) = middle;
    }
    return value - static_cast<float>(kLevels[high - 1]) < static_cast<float>(kLevels[high]) - value
               ? high - 1
               : high;
  };
  block_iq4_nl block;
  std::memset(&block, 0, sizeof block);
  block.d = 0x7e00;
  float largest = 0.0f, max = 0.0f;
  for (int i = 0; i < 32; ++i) {
    if (!std::isfinite(x[i]))
      return block;
    if (std::fabs(x[i]) > largest) {
      largest = std::fabs(x[i]);
      max = x[i];
    }
  }
  if (largest < 1e-15f) {
    block.d = 0;
    std::memset(block.qs, 0x88, sizeof block.qs);
    return block;
  }
  float d = max / static_cast<float>(kLevels[0]);
  const float id = 1 / d;
  volatile float products = 0, squares = 0; // volatile: each step rounded to f32
  int q[32];
  for (int i = 0; i < 32; ++i) {
    volatile float scaled = id * x[i];
    q[i] = best_index(scaled);
    const float level = static_cast<float>(kLevels[q[i]]);
    volatile float weight = x[i] * x[i];
    volatile float weighted = weight * level;
    volatile float product = weighted * x[i], square = weighted * level;
    products = products + product;
    squares = squares + square;
  }
  d = products / squares;
  if (std::isnan(d))
    return block;
  scalar.of(Format::f16).from_f32(&d, &block.d, 1);
  for (int i = 0; i < 16; ++i)
    block.qs[i] = static_cast<std::uint8_t>(q[i] | q[i + 16] << 4);
  return block;
}

void test_scalar_quantize(const Kernels &scalar) {
  check("scalar quantize_row_q4_0 follows its definition", [&] {
    int n = 0;
    for (const std::vector<float> &block : adversarial_blocks()) {
      block_q4_0 got;
      scalar.of(Format::q4_0).from_f32(block.data(), &got, 32);
      const block_q4_0 expected = quantize_by_definition(block.data(), scalar);
      EXPECT(std::memcmp(&got, &expected, sizeof got) == 0, "block %d", n);
      ++n;
    }
  });
  check("scalar quantize_row_q8_0 follows its definition", [&] {
    int n = 0;
    for (const std::vector<float> &block : adversarial_blocks()) {
      block_q8_0 got;
      scalar.of(Format::q8_0).from_f32(block.data(), &got, 32);
      const block_q8_0 expected = quantize_q8_0_by_definition(block.data(), scalar);
      EXPECT(std::memcmp(&got, &expected, sizeof got) == 0, "block %d", n);
      ++n;
    }
  });
  check("scalar quantize_row_iq4_nl follows its definition", [&] {
    int n = 0;
    for (const std::vector<float> &block : adversarial_blocks()) {
      block_iq4_nl got;
      scalar.of(Format::iq4_nl).from_f32(block.data(), &got, 32);
      const block_iq4_nl expected = quantize_iq4_nl_by_definition(block.data(), scalar);
      EXPECT(std::memcmp(&got, &expected, sizeof got) == 0, "block %d", n);
      ++n;
    }
  });
  check("scalar quantize_row_q4_0 special blocks", [&] {
    const auto quantize = [&](const std::vector<float> &x) {
      block_q4_0 block;
      scalar.of(Format::q4_0).from_f32(x.data(), &block, 32);
      return block;
    };
    const auto all_q = [](const block_q4_0 &block, int byte) {
      return std::all_of(block.qs, block.qs + 16, [&](int q) { return q == byte; });
    };
    const block_q4_0 zeros = quantize(std::vector<float>(32, 0.0f));
    EXPECT((zeros.d & 0x7fff) == 0 && all_q(zeros, 0x88), "zeros");
    const block_q4_0 tiny = quantize(std::vector<float>(32, 1e-39f));
    EXPECT((tiny.d & 0x7fff) == 0 && all_q(tiny, 0x88), "no inverse of d");
    const block_q4_0 nan = quantize(std::vector<float>(32, kNan));
    EXPECT((nan.d & 0x7fff) > 0x7c00 && all_q(nan, 0), "NaN");
    const block_q4_0 negative = quantize(std::vector<float>(32, -8.0f));
    EXPECT(negative.d == 0x3c00 && all_q(negative, 0), "-8 is q 0 times d 1");
    const block_q4_0 positive = quantize(std::vector<float>(32, 8.0f));
    EXPECT(positive.d == 0xbc00 && all_q(positive, 0), "8 is q 0 times d -1");
  });
}

/// Scales by least squared error, where ggml's definitions know another rule.
template <typename Block> void test_scalar_fit(const Kernels &scalar, Format format) {
  const RowKernels &rows = scalar.of(format);
  const auto stored_as = [&](const Block &block) {
    std::vector<float> stored(32);
    rows.to_f32(&block, stored.data(), 32);
    return stored;
  };
  check(std::string("scalar ") + format_name(format) + " fitted blocks never err more", [&] {
    int n = 0, fitted = 0;
    double left = 0; // of ggml's errors, a share of each
    for (const std::vector<float> &values : adversarial_blocks()) {
      Block own, got;
      rows.from_f32(values.data(), &own, 32);
      rows.fit_f32(values.data(), &got, 32);
      const auto error_of = [&](const Block &block) {
        const std::vector<float> stored = stored_as(block);
        double error = 0;
        for (std::size_t i = 0; i < 32; ++i)
          error += std::pow(static_cast<double>(values[i]) - stored[i], 2);
        return error;
      };
      if (std::memcmp(&own, &got, sizeof own) != 0) {
        const double error = error_of(got), own_error = error_of(own);
        EXPECT(error < own_error, "block %d: %.9g, ggml's %.9g", n, error, own_error);
        ++fitted;
        left += error / own_error;
      }
      ++n;
    }
    // Of 3000 blocks of noise alone nine in ten gain, a tenth each.
    EXPECT(fitted > 2700 && left < 0.9 * fitted, "%d of %d blocks gain, %.3g of the error stays",
           fitted, n, left / fitted);
  });
  check(
      std::string("scalar ") + format_name(format) + " magnitudes grow no more than they may", [&] {
        const double most = 1.0 + format_info(format).growth_of(true);
        const auto look_at = [&](const std::vector<float> &values) {
          double largest = 0, largest_stored = 0;
          Block block;
          rows.fit_f32(values.data(), &block, 32);
          for (float x : values)
            largest = std::max(largest, std::fabs(static_cast<double>(x)));
          for (float x : stored_as(block))
            largest_stored = std::max(largest_stored, std::fabs(static_cast<double>(x)));
          // A scale below the smallest f16 rounds to it or to none, one that is too large to
          // infinity.
          if (format_info(format).keeps_finite(largest) && largest > 0.01)
            EXPECT(largest_stored <= most * largest, "%.9g becomes %.9g", largest, largest_stored);
        };
        for (const std::vector<float> &values : adversarial_blocks())
          look_at(values);
        // One or a few are the largest; where the others lie, all of them round up for some scale.
        for (int count : {1, 2, 5, 16})
          for (int step = -1000; step < 1000; ++step)
            for (float largest : {1.0f, -1.0f}) {
              std::vector<float> values(32, static_cast<float>(step) / 1000);
              std::fill_n(values.begin(), count, largest);
              look_at(values);
            }
      });
}

// --- every ISA against the scalar table, bit for bit ------------------------------------------

/// Blocks of one format, from values and to values.
template <typename Block>
void test_blocks(const std::string &isa, const Kernels &kernels, const Kernels &scalar,
                 Format format) {
  const std::size_t unit = static_cast<std::size_t>(format_info(format).block_values);
  const std::string name = isa + " " + format_name(format);
  const RowKernels &rows = kernels.of(format), &oracle = scalar.of(format);
  using Ways = std::vector<std::pair<RowKernels, RowKernels>>; // each with its oracle
  Ways ways = {{rows, oracle}};
  check(name + " scales are fitted where the format has a choice", [&] {
    for (const RowKernels *kernels_of : {&rows, &oracle})
      EXPECT((kernels_of->fit_f32 != nullptr) == format_info(format).fits &&
                 (kernels_of->fit_f16 != nullptr) == format_info(format).fits,
             "the table says %d", format_info(format).fits);
  });
  if (format_info(format).fits) {
    ways.emplace_back(rows, oracle);
    for (RowKernels *fitted : {&ways[1].first, &ways[1].second}) {
      fitted->from_f32 = fitted->fit_f32;
      fitted->from_f16 = fitted->fit_f16;
    }
  }
  check(name + " from_f32 adversarial blocks", [&] {
    std::vector<std::vector<float>> blocks = adversarial_blocks();
    blocks.resize(blocks.size() / 2 * 2); // whole blocks of 64 too
    Input<float> x(blocks.size() * 32, 1);
    for (std::size_t b = 0; b < blocks.size(); ++b)
      std::copy(blocks[b].begin(), blocks[b].end(), x.data() + b * 32);
    for (const auto &[way, by] : ways)
      compare_rows<Block>(x, x.size() / unit, 1, x.size(), way.from_f32, by.from_f32);
  });
  check(name + " from_f16 adversarial blocks, and any bits", [&] {
    std::vector<std::vector<float>> blocks = adversarial_blocks();
    blocks.resize(blocks.size() / 2 * 2);
    Random random(3);
    Input<f16_t> x((blocks.size() + 6000) * 32, 1);
    for (std::size_t b = 0; b < blocks.size(); ++b)
      scalar.of(Format::f16).from_f32(blocks[b].data(), x.data() + b * 32, 32);
    for (std::size_t i = blocks.size() * 32; i < x.size(); ++i) {
      // The first half any halves, the second finite ones and subnormals.
      const bool any = i < (blocks.size() + 3000) * 32;
      x[i] = static_cast<f16_t>(any ? random() : random() & 0x83ff);
    }
    for (const auto &[way, by] : ways)
      compare_rows<Block>(x, x.size() / unit, 1, x.size(), way.from_f16, by.from_f16);
  });
  check(name + " from values, rows of 1 to 17 blocks, misaligned", [&] {
    Random random(4);
    for (std::size_t num_blocks = 1; num_blocks <= 17; ++num_blocks)
      for (std::size_t misalignment : {0, 1, 3}) {
        const std::size_t n = num_blocks * unit;
        Input<float> x(n, misalignment);
        Input<f16_t> h(n, misalignment);
        for (std::size_t i = 0; i < n; ++i)
          x[i] = normal(random);
        scalar.of(Format::f16).from_f32(x.data(), h.data(), n);
        for (const auto &[way, by] : ways) {
          compare_rows<Block>(x, num_blocks, misalignment, n, way.from_f32, by.from_f32);
          compare_rows<Block>(h, num_blocks, misalignment, n, way.from_f16, by.from_f16);
        }
      }
  });
  check(name + " to values, every d, every code", [&] {
    Input<Block> x(65536 + 256, 1);
    for (std::size_t b = 0; b < x.size(); ++b) {
      x[b].d = static_cast<f16_t>(b < 65536 ? b : 0x3555);
      std::size_t i = 0;
      for (auto &q : x[b].qs) { // every byte, and with each d every nibble
        const std::size_t byte = i * 17 + b * 16 + (b < 65536 ? 0 : b);
        q = static_cast<std::remove_reference_t<decltype(q)>>(byte);
        ++i;
      }
    }
    compare_rows<float>(x, x.size() * unit, 1, x.size() * unit, rows.to_f32, oracle.to_f32);
    compare_rows<f16_t>(x, x.size() * unit, 1, x.size() * unit, rows.to_f16, oracle.to_f16);
  });
  check(name + " to values, rows of 1 to 17 blocks, misaligned", [&] {
    Random random(5);
    for (std::size_t num_blocks = 1; num_blocks <= 17; ++num_blocks)
      for (std::size_t misalignment : {0, 1, 3}) {
        Input<Block> x(num_blocks, misalignment);
        for (std::size_t b = 0; b < num_blocks; ++b) {
          x[b].d = static_cast<f16_t>(random() & 0xbbff); // finite
          for (auto &q : x[b].qs)
            q = static_cast<std::remove_reference_t<decltype(q)>>(random());
        }
        compare_rows<float>(x, num_blocks * unit, misalignment, num_blocks * unit, rows.to_f32,
                            oracle.to_f32);
        compare_rows<f16_t>(x, num_blocks * unit, misalignment, num_blocks * unit, rows.to_f16,
                            oracle.to_f16);
      }
  });
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  const Kernels &scalar = kernels_for("scalar");
  test_scalar_quantize(scalar);
  test_scalar_fit<block_q4_0>(scalar, Format::q4_0);
  test_scalar_fit<block_iq4_nl>(scalar, Format::iq4_nl);
  on_each_isa([&](const std::string &isa, const Kernels &kernels) {
    if (&kernels != &scalar) {
      test_blocks<block_q4_0>(isa, kernels, scalar, Format::q4_0);
      test_blocks<block_q8_0>(isa, kernels, scalar, Format::q8_0);
      test_blocks<block_iq4_nl>(isa, kernels, scalar, Format::iq4_nl);
      test_blocks<block_nl4>(isa, kernels, scalar, Format::nl4);
      test_blocks<block_nl3>(isa, kernels, scalar, Format::nl3);
    }
  });
  return summary();
}
