// Every kernel of every instruction set that this machine can run: conversions against the scalar
// table bit for bit (and the scalar table against definitions), sums against float64 with bounds
// that follow from the number of roundings. Lengths run around the width of a vector, pointers are
// misaligned, outputs lie between guard bytes, inputs end where their allocation ends, so that a
// sanitizer sees any step beyond.
//
// Usage: test_kernels [part of a check's name]

#include "checks.h"
#include "kernels/dispatch.h"

#include <stdexcept>
#include <type_traits>

using namespace mixedkv;
using namespace testing;

namespace {

/// 1, 3, 7, N/2, N, N+1, 3N, 8N+2 for the widths of all vectors and of loops unrolled over them.
std::vector<std::size_t> lengths() {
  std::vector<std::size_t> all = {1, 3, 7};
  for (std::size_t n : {4, 8, 16, 64})
    for (std::size_t length : {n / 2, n, n + 1, 3 * n, 8 * n + 2})
      all.push_back(length);
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  return all;
}

// --- conversions: the scalar table against definitions ------------------------------------------

void test_scalar_conversions(const Kernels &scalar) {
  check("scalar f16_to_f32 is the value of every half", [&] {
    for (unsigned h = 0; h < 65536; ++h) {
      const f16_t half = static_cast<f16_t>(h);
      float x;
      scalar.of(Format::f16).to_f32(&half, &x, 1);
      if ((h & 0x7c00) != 0x7c00)
        EXPECT(x == value_of_half(half) && std::signbit(x) == (h >> 15 != 0), "half %04x", h);
      else if ((h & 0x3ff) == 0)
        EXPECT(x == (h >> 15 ? -kInf : kInf), "half %04x", h);
      else
        EXPECT(std::isnan(x), "half %04x", h);
    }
  });
  check("scalar bf16 to_f32 is the upper half of every f32, and rounds back", [&] {
    const auto convert = [&](float x) {
      bf16_t y;
      scalar.of(Format::bf16).from_f32(&x, &y, 1);
      return y.bits;
    };
    for (std::uint32_t h = 0; h < 65536; ++h) {
      const bf16_t y = {static_cast<std::uint16_t>(h)};
      float x;
      scalar.of(Format::bf16).to_f32(&y, &x, 1);
      EXPECT(bits_of(x) == h << 16, "bf16 %04x", h);
      if ((h & 0x7f80) == 0x7f80) {
        const unsigned expected = (h & 0x7f) != 0 ? h | 0x40 : h; // NaNs become quiet
        EXPECT(convert(x) == expected, "bf16 %04x", h);
        continue;
      }
      const std::uint32_t up = h + 1, even = h & 1 ? up : h; // up: one step from zero
      EXPECT(convert(x) == h, "bf16 %04x", h);
      EXPECT(convert(float_of(h << 16 | 0x7fff)) == h, "below the middle above %04x", h);
      EXPECT(convert(float_of(h << 16 | 0x8000)) == even, "the middle above %04x", h);
      EXPECT(convert(float_of(h << 16 | 0x8001)) == up, "above the middle above %04x", h);
    }
    EXPECT((convert(float_of(0xff800001u)) & 0x7fff) > 0x7f80, "signalling NaN, low payload");
  });
  check("scalar f32_to_f16 rounds to nearest even around every half", [&] {
    const auto convert = [&](float x) {
      f16_t half;
      scalar.of(Format::f16).from_f32(&x, &half, 1);
      return half;
    };
    for (unsigned h = 0; h < 0x7c00; ++h) {
      const unsigned sign = h & 1 ? 0x8000 : 0; // either sign for half of them
      const double here = value_of_half(static_cast<f16_t>(h));
      const double next = h == 0x7bff ? 65536.0 : value_of_half(static_cast<f16_t>(h + 1));
      const float middle = static_cast<float>((here + next) / 2); // exact
      const float s = sign ? -1.0f : 1.0f;
      const unsigned even = h & 1 ? h + 1 : h;
      EXPECT(convert(s * static_cast<float>(here)) == (h | sign), "half %04x", h);
      EXPECT(convert(s * middle) == (even | sign), "above %04x", h);
      EXPECT(convert(s * std::nextafter(middle, 0.0f)) == (h | sign), "above %04x", h);
      EXPECT(convert(s * std::nextafter(middle, kInf)) == ((h + 1) | sign), "above %04x", h);
    }
    EXPECT(convert(1e30f) == 0x7c00 && convert(-kInf) == 0xfc00, "overflow");
    EXPECT((convert(kNan) & 0x7fff) > 0x7c00, "NaN");
    EXPECT((convert(float_of(0xff800001u)) & 0x7fff) > 0x7c00, "signalling NaN, low payload");
    EXPECT(convert(-1e-30f) == 0x8000, "underflow keeps the sign");
  });
}

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

const int kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

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

/// Rows of 32 that go wrong first.
std::vector<std::vector<float>> adversarial_blocks() {
  std::vector<std::vector<float>> blocks;
  const auto filled = [](float x) { return std::vector<float>(32, x); };
  const auto with = [&](float fill, std::initializer_list<std::pair<int, float>> values) {
    std::vector<float> block = filled(fill);
    for (const auto &value : values)
      block[static_cast<std::size_t>(value.first)] = value.second;
    blocks.push_back(block);
  };
  for (float x :
       {0.0f,      -0.0f,      1.0f,       -1.0f,  FLT_MIN, -FLT_MIN, FLT_TRUE_MIN, -FLT_TRUE_MIN,
        2.3e-38f,  2.4e-38f,   -2.35e-38f, 1e-30f, FLT_MAX, -FLT_MAX, 65504.0f,     524032.0f,
        524160.0f, -524287.0f, 1e6f,       kInf,   -kInf,   kNan,     -kNan})
    blocks.push_back(filled(x));
  with(0.0f, {{0, -0.0f}});
  with(-0.0f, {{31, 0.0f}});
  // d on both sides of the smallest value that has an inverse, 2^-128
  for (float scale : {0.99f, 1.0f, 1.01f, 2.0f})
    for (float sign : {1.0f, -1.0f})
      with(0.0f, {{7, sign * scale * std::ldexp(1.0f, -125)}, {9, 1e-39f}});
  for (int i = 0; i < 32; ++i) { // a single value, in every lane
    with(0.0f, {{i, 3.0f}});
    with(-0.0f, {{i, -1e-3f}});
    with(0.5f, {{i, -2.0f}});
    with(0.5f, {{i, kNan}});
    with(0.5f, {{i, i % 2 ? kInf : -kInf}});
    with(FLT_MAX, {{i, float_of(0xff800001u)}}); // a NaN with its sign, beside huge values
  }
  for (int i = 0; i < 32; ++i) // equal magnitudes of either sign, each order of lanes
    for (int j = 0; j < 32; ++j)
      if (i != j)
        with(0.25f, {{i, 4.0f}, {j, -4.0f}});
  // x * id + 8.5 at, just below, and just above an integer, for several d
  for (float max : {-8.0f, 8.0f, -0.8f, 5.3f, -3e-5f, 1234.5f, 1e-36f, -1e30f}) {
    for (int step = 0; step < 3; ++step) {
      std::vector<float> block(32);
      for (int i = 0; i < 32; ++i) {
        const float x = (static_cast<float>(i % 16) - 7.5f) * (max / -8.0f);
        block[static_cast<std::size_t>(i)] =
            step == 0 ? x : std::nextafter(x, step == 1 ? kInf : -kInf);
      }
      block[static_cast<std::size_t>(step * 11)] = max;
      blocks.push_back(block);
    }
  }
  // The same of Q8_0's halves and of what lies half way between IQ4_NL's levels
  for (float max : {127.0f, -127.0f, 12.7f, -1e-3f, 3e30f, 3e14f, 1.0f})
    for (int step = 0; step < 3; ++step)
      for (bool levels : {false, true}) {
        std::vector<float> block(32);
        for (int i = 0; i < 32; ++i) {
          const float middle =
              levels ? 0.5f * static_cast<float>(kLevels[i % 15] + kLevels[i % 15 + 1])
                     : static_cast<float>(i * 4) - 62.5f;
          const float x = middle * (max / -127.0f);
          block[static_cast<std::size_t>(i)] =
              step == 0 ? x : std::nextafter(x, step == 1 ? kInf : -kInf);
        }
        block[static_cast<std::size_t>(step * 7)] = max;
        blocks.push_back(block);
      }
  for (float scale : {1e-15f, 1e-14f, 1e12f, 1e13f, 1e18f, 3e18f, 1e19f, 2e19f})
    for (int i = 0; i < 32; ++i) { // squares and cubes out of range
      std::vector<float> block(32);
      for (int j = 0; j < 32; ++j)
        block[static_cast<std::size_t>(j)] =
            scale * (static_cast<float>((i * 7 + j * 11) % 32) - 15.5f) / 16;
      blocks.push_back(block);
    }
  {
    std::vector<float> ramp(32);
    for (int i = 0; i < 32; ++i)
      ramp[static_cast<std::size_t>(i)] = std::ldexp(i % 2 ? -1.0f : 1.0f, i - 16);
    blocks.push_back(ramp);
  }
  Random random(7);
  for (int i = 0; i < 3000; ++i) {
    std::vector<float> block(32);
    const float scale = std::ldexp(1.0f, between(random, -20, 12));
    for (float &x : block)
      x = scale * normal(random);
    blocks.push_back(block);
  }
  for (int i = 0; i < 300; ++i) { // few different values: many ties
    std::vector<float> block(32);
    for (float &x : block)
      x = static_cast<float>(between(random, -3, 3));
    blocks.push_back(block);
  }
  for (int i = 0; i < 1000; ++i) { // any bits at all
    std::vector<float> block(32);
    for (float &x : block)
      x = float_of(static_cast<std::uint32_t>(random()));
    blocks.push_back(block);
  }
  return blocks;
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

// --- conversions: every ISA against the scalar table, bit for bit ------------------------------

template <typename Y, typename X, typename F>
void compare_rows(const Input<X> &x, std::size_t num_out, std::size_t misalignment, std::size_t n,
                  F *got_fn, F *expected_fn) {
  Output<Y> got(num_out, misalignment), expected(num_out, misalignment);
  got_fn(x.data(), got.data(), n);
  expected_fn(x.data(), expected.data(), n);
  EXPECT(got.guards_intact() && expected.guards_intact(), "guards, n %zu", n);
  for (std::size_t i = 0; i < num_out; ++i)
    if (std::memcmp(&got[i], &expected[i], sizeof(Y)) != 0) {
      EXPECT(false, "n %zu: element %zu differs", n, i);
      break;
    }
}

void test_conversions(const std::string &isa, const Kernels &kernels, const Kernels &scalar) {
  check(isa + " f16_to_f32 all halves", [&] {
    Input<f16_t> x(65536, 0);
    for (std::size_t i = 0; i < x.size(); ++i)
      x[i] = static_cast<f16_t>(i);
    compare_rows<float>(x, 65536, 0, 65536, kernels.of(Format::f16).to_f32,
                        scalar.of(Format::f16).to_f32);
  });
  check(isa + " f32_to_f16 around all halves, and any bits", [&] {
    std::vector<float> values;
    for (unsigned h = 0; h < 65536; ++h) {
      const f16_t half = static_cast<f16_t>(h);
      float x;
      scalar.of(Format::f16).to_f32(&half, &x, 1);
      for (std::uint32_t offset : {0u, 1u, 0xfffu, 0x1000u, 0x1001u, 0x1fffu})
        values.push_back(float_of(bits_of(x) + offset));
    }
    Random random(1);
    for (int i = 0; i < 200000; ++i)
      values.push_back(float_of(static_cast<std::uint32_t>(random())));
    for (int i = 0; i < 100000; ++i) // halves' subnormal range
      values.push_back(std::ldexp(normal(random), between(random, -28, -12)));
    Input<float> x(values.size(), 0);
    std::copy(values.begin(), values.end(), x.data());
    compare_rows<f16_t>(x, x.size(), 0, x.size(), kernels.of(Format::f16).from_f32,
                        scalar.of(Format::f16).from_f32);
  });
  check(isa + " f16 and f32 rows of all lengths, misaligned", [&] {
    Random random(2);
    for (std::size_t n : lengths())
      for (std::size_t misalignment : {0, 1, 2, 3, 5}) {
        Input<float> x(n, misalignment);
        Input<f16_t> h(n, misalignment);
        for (std::size_t i = 0; i < n; ++i)
          x[i] = normal(random);
        scalar.of(Format::f16).from_f32(x.data(), h.data(), n);
        compare_rows<f16_t>(x, n, misalignment, n, kernels.of(Format::f16).from_f32,
                            scalar.of(Format::f16).from_f32);
        compare_rows<float>(h, n, misalignment, n, kernels.of(Format::f16).to_f32,
                            scalar.of(Format::f16).to_f32);
      }
  });
  check(isa + " bf16 rows: all of them, around them, any bits", [&] {
    Input<bf16_t> all(65536, 0);
    Input<f16_t> halves(65536, 0);
    std::vector<float> values;
    for (std::uint32_t h = 0; h < 65536; ++h) {
      all[h] = {static_cast<std::uint16_t>(h)};
      halves[h] = static_cast<f16_t>(h);
      for (std::uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu})
        values.push_back(float_of(h << 16 | low));
    }
    const RowKernels &rows = kernels.of(Format::bf16), &oracle = scalar.of(Format::bf16);
    compare_rows<float>(all, all.size(), 0, all.size(), rows.to_f32, oracle.to_f32);
    compare_rows<f16_t>(all, all.size(), 0, all.size(), rows.to_f16, oracle.to_f16);
    compare_rows<bf16_t>(halves, all.size(), 0, all.size(), rows.from_f16, oracle.from_f16);
    Input<float> x(values.size(), 0);
    std::copy(values.begin(), values.end(), x.data());
    compare_rows<bf16_t>(x, x.size(), 0, x.size(), rows.from_f32, oracle.from_f32);
  });
  check(isa + " bf16 rows of all lengths, misaligned", [&] {
    Random random(2);
    const RowKernels &rows = kernels.of(Format::bf16), &oracle = scalar.of(Format::bf16);
    for (std::size_t n : lengths())
      for (std::size_t misalignment : {0, 1, 2, 3, 5}) {
        Input<float> x(n, misalignment);
        Input<f16_t> h(n, misalignment);
        Input<bf16_t> b(n, misalignment);
        for (std::size_t i = 0; i < n; ++i)
          x[i] = normal(random);
        scalar.of(Format::f16).from_f32(x.data(), h.data(), n);
        oracle.from_f32(x.data(), b.data(), n);
        compare_rows<bf16_t>(x, n, misalignment, n, rows.from_f32, oracle.from_f32);
        compare_rows<bf16_t>(h, n, misalignment, n, rows.from_f16, oracle.from_f16);
        compare_rows<float>(b, n, misalignment, n, rows.to_f32, oracle.to_f32);
        compare_rows<f16_t>(b, n, misalignment, n, rows.to_f16, oracle.to_f16);
      }
  });
  check(isa + " all_finite finds one bad value anywhere", [&] {
    for (std::size_t n : lengths())
      for (std::size_t misalignment : {0, 1, 3}) {
        Input<float> x(n, misalignment);
        Input<f16_t> h(n, misalignment);
        for (std::size_t i = 0; i < n; ++i) {
          x[i] = i % 2 ? FLT_MAX : -FLT_MAX;
          h[i] = i % 2 ? 0x7bff : 0xfbff;
        }
        EXPECT(kernels.all_finite_f32(x.data(), n), "n %zu", n);
        EXPECT(kernels.all_finite_f16(h.data(), n), "n %zu", n);
        for (std::size_t i = 0; i < n; ++i) {
          const float kept = x[i];
          const f16_t kept_half = h[i];
          for (float bad : {kInf, -kInf, kNan, float_of(0xff800001u)}) {
            x[i] = bad;
            EXPECT(!kernels.all_finite_f32(x.data(), n), "n %zu, at %zu", n, i);
          }
          for (f16_t bad : {0x7c00, 0xfc00, 0x7e00, 0xfc01}) {
            h[i] = bad;
            EXPECT(!kernels.all_finite_f16(h.data(), n), "n %zu, at %zu", n, i);
          }
          x[i] = kept;
          h[i] = kept_half;
        }
      }
    EXPECT(kernels.all_finite_f32(nullptr, 0) && kernels.all_finite_f16(nullptr, 0), "empty");
  });
  check(isa + " largest_magnitude finds it anywhere, NaN aside", [&] {
    Random random(3);
    for (std::size_t n : lengths())
      for (std::size_t misalignment : {0, 1, 3}) {
        Input<float> x(n, misalignment);
        for (std::size_t i = 0; i < n; ++i)
          x[i] = i % 3 == 2 ? kNan : normal(random);
        float want = 0.0f;
        for (std::size_t i = 0; i < n; ++i)
          want = std::fabs(x[i]) > want ? std::fabs(x[i]) : want;
        EXPECT(kernels.largest_magnitude(x.data(), n) == want, "n %zu", n);
        for (std::size_t i = 0; i < n; ++i) {
          const float kept = x[i];
          for (float large : {65520.0f, -65520.0f, FLT_MAX, -FLT_MAX, kInf, -kInf}) {
            x[i] = large;
            EXPECT(kernels.largest_magnitude(x.data(), n) == std::fabs(large), "n %zu, at %zu", n,
                   i);
          }
          x[i] = kept;
        }
        std::fill(x.data(), x.data() + n, kNan);
        EXPECT(kernels.largest_magnitude(x.data(), n) == 0.0f, "n %zu of NaN", n);
      }
    EXPECT(kernels.largest_magnitude(nullptr, 0) == 0.0f, "empty");
  });
}

/// Blocks of one format, from values and to values.
template <typename Block>
void test_blocks(const std::string &isa, const Kernels &kernels, const Kernels &scalar,
                 Format format) {
  const std::string name = isa + " " + format_name(format);
  const RowKernels &rows = kernels.of(format), &oracle = scalar.of(format);
  check(name + " from_f32 adversarial blocks", [&] {
    const std::vector<std::vector<float>> blocks = adversarial_blocks();
    Input<float> x(blocks.size() * 32, 1);
    for (std::size_t b = 0; b < blocks.size(); ++b)
      std::copy(blocks[b].begin(), blocks[b].end(), x.data() + b * 32);
    compare_rows<Block>(x, blocks.size(), 1, x.size(), rows.from_f32, oracle.from_f32);
  });
  check(name + " from_f16 adversarial blocks, and any bits", [&] {
    const std::vector<std::vector<float>> blocks = adversarial_blocks();
    Random random(3);
    Input<f16_t> x((blocks.size() + 6000) * 32, 1);
    for (std::size_t b = 0; b < blocks.size(); ++b)
      scalar.of(Format::f16).from_f32(blocks[b].data(), x.data() + b * 32, 32);
    for (std::size_t i = blocks.size() * 32; i < x.size(); ++i) {
      // The first half any halves, the second finite ones and subnormals.
      const bool any = i < (blocks.size() + 3000) * 32;
      x[i] = static_cast<f16_t>(any ? random() : random() & 0x83ff);
    }
    compare_rows<Block>(x, x.size() / 32, 1, x.size(), rows.from_f16, oracle.from_f16);
  });
  check(name + " from values, rows of 1 to 17 blocks, misaligned", [&] {
    Random random(4);
    for (std::size_t num_blocks = 1; num_blocks <= 17; ++num_blocks)
      for (std::size_t misalignment : {0, 1, 3}) {
        const std::size_t n = num_blocks * 32;
        Input<float> x(n, misalignment);
        Input<f16_t> h(n, misalignment);
        for (std::size_t i = 0; i < n; ++i)
          x[i] = normal(random);
        scalar.of(Format::f16).from_f32(x.data(), h.data(), n);
        compare_rows<Block>(x, num_blocks, misalignment, n, rows.from_f32, oracle.from_f32);
        compare_rows<Block>(h, num_blocks, misalignment, n, rows.from_f16, oracle.from_f16);
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
    compare_rows<float>(x, x.size() * 32, 1, x.size() * 32, rows.to_f32, oracle.to_f32);
    compare_rows<f16_t>(x, x.size() * 32, 1, x.size() * 32, rows.to_f16, oracle.to_f16);
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
        compare_rows<float>(x, num_blocks * 32, misalignment, num_blocks * 32, rows.to_f32,
                            oracle.to_f32);
        compare_rows<f16_t>(x, num_blocks * 32, misalignment, num_blocks * 32, rows.to_f16,
                            oracle.to_f16);
      }
  });
}

// --- attention ---------------------------------------------------------------------------------

enum class Order { dense, strided, indexed };

/// By definition: value i of a row of blocks.
double value_in_blocks(Format type, const char *row, int i) {
  if (type == Format::q4_0)
    return value_of_q4(reinterpret_cast<const block_q4_0 *>(row)[i / 32], i % 32);
  if (type == Format::iq4_nl) {
    const block_iq4_nl &block = reinterpret_cast<const block_iq4_nl *>(row)[i / 32];
    const int q = i % 32 < 16 ? block.qs[i % 32] & 15 : block.qs[i % 32 - 16] >> 4;
    return kLevels[q] * value_of_half(block.d);
  }
  const block_q8_0 &block = reinterpret_cast<const block_q8_0 *>(row)[i / 32];
  return block.qs[i % 32] * value_of_half(block.d);
}

/// num rows of a type: dense, with gaps between them, or picked in random order from more.
struct RowSet {
  Format type;
  int num, dim;
  std::ptrdiff_t stride;
  std::vector<std::int32_t> index;
  std::unique_ptr<Input<char>> bytes;
  std::vector<double> values; ///< [num, dim], in the order in which the kernel sees them

  RowSet(Random &random, Format row_type, int num_rows, int row_dim, Order order,
         const Kernels &scalar)
      : type(row_type), num(num_rows), dim(row_dim) {
    const std::size_t size = row_bytes(type, static_cast<std::size_t>(dim));
    const std::size_t element = type == Format::f32 ? 4 : 2;
    stride = static_cast<std::ptrdiff_t>(size + (order == Order::dense ? 0 : 3 * element));
    const int stored = order == Order::indexed ? 2 * num + 1 : num;
    // The allocation ends with the last row's last byte.
    bytes.reset(new Input<char>(
        static_cast<std::size_t>(stride) * static_cast<std::size_t>(stored - 1) + size,
        element * static_cast<std::size_t>(between(random, 0, 3))));
    std::vector<double> all(static_cast<std::size_t>(stored * dim));
    std::vector<float> x(static_cast<std::size_t>(dim));
    std::memset(bytes->data(), 0xff, bytes->size()); // NaN between rows
    for (int j = 0; j < stored; ++j) {
      for (float &value : x)
        value = normal(random);
      char *row = bytes->data() + stride * j;
      double *exact = all.data() + j * dim;
      if (type == Format::f32) {
        std::memcpy(row, x.data(), size);
        std::copy(x.begin(), x.end(), exact);
      } else if (type == Format::f16) {
        f16_t *halves = reinterpret_cast<f16_t *>(row);
        scalar.of(Format::f16).from_f32(x.data(), halves, x.size());
        for (int i = 0; i < dim; ++i)
          exact[i] = value_of_half(halves[i]);
      } else if (type == Format::bf16) {
        bf16_t *numbers = reinterpret_cast<bf16_t *>(row);
        scalar.of(type).from_f32(x.data(), numbers, x.size());
        for (int i = 0; i < dim; ++i)
          exact[i] = float_of(static_cast<std::uint32_t>(numbers[i].bits) << 16);
      } else {
        scalar.of(type).from_f32(x.data(), row, x.size());
        for (int i = 0; i < dim; ++i)
          exact[i] = value_in_blocks(type, row, i);
      }
    }
    for (int j = 0; j < num; ++j) {
      const int row = order == Order::indexed ? between(random, 0, stored - 1) : j;
      if (order == Order::indexed)
        index.push_back(row);
      values.insert(values.end(), all.begin() + row * dim, all.begin() + (row + 1) * dim);
    }
  }
  Rows rows() const { return {bytes->data(), stride, index.empty() ? nullptr : index.data()}; }
  const double *row(int j) const { return values.data() + j * dim; }
};

/// What rounding a query to the two 8-bit terms of neon_dotprod and its kin may add to a score:
/// half a step of 1/254 of the block's scale (its largest magnitude / 127) for each value, and the
/// roundings of the split itself, which are below one part in a hundred of it.
double split_error(const float *q, const double *k, int dim) {
  double error = 0;
  for (int b = 0; b < dim; b += 32) {
    double largest = 0, sum = 0;
    for (int i = b; i < b + 32; ++i) {
      largest = std::max(largest, std::fabs(static_cast<double>(q[i])));
      sum += std::fabs(k[i]);
    }
    error += 1.01 * largest / 127 * (0.5 / 254) * sum;
  }
  return error;
}

void check_qk(const std::string &isa, const Kernels &kernels, const Kernels &scalar, Random &random,
              Format type, int num_rows, int num_keys, int dim, Order order) {
  const RowSet keys(random, type, num_keys, dim, order, scalar);
  const Rows rows = keys.rows();
  const std::size_t ld_q = static_cast<std::size_t>(dim + between(random, 0, 5));
  const std::size_t ld_scores = static_cast<std::size_t>(num_keys + between(random, 0, 5));
  const std::size_t n = static_cast<std::size_t>(num_rows);
  const std::size_t misalignment = static_cast<std::size_t>(between(random, 0, 3));
  Input<float> q((n - 1) * ld_q + static_cast<std::size_t>(dim), misalignment);
  std::fill(q.data(), q.data() + q.size(), kNan);
  for (std::size_t r = 0; r < n; ++r)
    for (int i = 0; i < dim; ++i)
      q[r * ld_q + static_cast<std::size_t>(i)] = normal(random);
  Output<float> scores((n - 1) * ld_scores + static_cast<std::size_t>(num_keys), misalignment);
  std::fill(scores.data(), scores.data() + scores.size(), 12345.0f);
  const auto qk = kernels.of(type).qk;
  qk(q.data(), ld_q, num_rows, &rows, num_keys, dim, scores.data(), ld_scores);
  EXPECT(scores.guards_intact(), "guards: rows %d keys %d dim %d", num_rows, num_keys, dim);
  // All NEON variants but the plain one.
  const bool split = isa.rfind("neon_", 0) == 0 && type == Format::q4_0;
  std::vector<float> alone(static_cast<std::size_t>(num_keys));
  for (std::size_t r = 0; r < n; ++r) {
    const float *row = q.data() + r * ld_q;
    qk(row, ld_q, 1, &rows, num_keys, dim, alone.data(), alone.size());
    for (int j = 0; j < num_keys; ++j) {
      const double *k = keys.row(j);
      double expected = 0, magnitude = 0;
      for (int i = 0; i < dim; ++i) {
        expected += row[i] * k[i];
        magnitude += std::fabs(row[i] * k[i]);
      }
      // A sum of dim products, each rounded at most dim times.
      const double bound = dim * kUlp * magnitude + (split ? split_error(row, k, dim) : 0.0);
      const float got = scores[r * ld_scores + static_cast<std::size_t>(j)];
      EXPECT(std::fabs(got - expected) <= bound,
             "rows %d keys %d dim %d: row %zu key %d: %.9g, not %.9g, bound %.3g", num_rows,
             num_keys, dim, r, j, static_cast<double>(got), expected, bound);
      EXPECT(bits_of(got) == bits_of(alone[static_cast<std::size_t>(j)]),
             "rows %d keys %d dim %d: row %zu key %d has other bits than alone", num_rows, num_keys,
             dim, r, j);
    }
    for (std::size_t j = static_cast<std::size_t>(num_keys); r + 1 < n && j < ld_scores; ++j)
      EXPECT(scores[r * ld_scores + j] == 12345.0f, "wrote between rows");
  }
}

void check_pv(const Kernels &kernels, const Kernels &scalar, Random &random, Format type,
              int num_rows, int num_keys, int dim, Order order) {
  const RowSet values(random, type, num_keys, dim, order, scalar);
  const Rows rows = values.rows();
  const std::size_t ld_p = static_cast<std::size_t>(num_keys + between(random, 0, 5));
  const std::size_t ld_acc = static_cast<std::size_t>(dim + between(random, 0, 5));
  const std::size_t n = static_cast<std::size_t>(num_rows);
  const std::size_t misalignment = static_cast<std::size_t>(between(random, 0, 3));
  Input<float> p((n - 1) * ld_p + static_cast<std::size_t>(num_keys), misalignment);
  std::fill(p.data(), p.data() + p.size(), kNan);
  for (std::size_t r = 0; r < n; ++r)
    for (int j = 0; j < num_keys; ++j)
      p[r * ld_p + static_cast<std::size_t>(j)] = std::exp(-std::fabs(normal(random)));
  Output<float> acc((n - 1) * ld_acc + static_cast<std::size_t>(dim), misalignment);
  for (std::size_t i = 0; i < acc.size(); ++i)
    acc[i] = normal(random);
  const std::vector<float> before(acc.data(), acc.data() + acc.size());
  const auto pv = kernels.of(type).pv;
  pv(p.data(), ld_p, num_rows, &rows, num_keys, dim, acc.data(), ld_acc);
  EXPECT(acc.guards_intact(), "guards: rows %d keys %d dim %d", num_rows, num_keys, dim);

  // The same run in two parts, one row at a time: sums ascend over keys, so not a bit may differ.
  std::vector<float> parts = before;
  const int cut = between(random, 0, num_keys);
  Rows second = rows;
  if (rows.index)
    second.index += cut;
  else
    second.base = static_cast<const char *>(rows.base) + rows.stride * cut;
  for (std::size_t r = 0; r < n; ++r) {
    pv(p.data() + r * ld_p, ld_p, 1, &rows, cut, dim, parts.data() + r * ld_acc, ld_acc);
    pv(p.data() + r * ld_p + cut, ld_p, 1, &second, num_keys - cut, dim, parts.data() + r * ld_acc,
       ld_acc);
  }
  for (std::size_t r = 0; r < n; ++r)
    for (std::size_t i = 0; i < ld_acc && r * ld_acc + i < acc.size(); ++i) {
      const std::size_t at = r * ld_acc + i;
      if (i >= static_cast<std::size_t>(dim)) {
        EXPECT(acc[at] == before[at], "wrote between rows");
        continue;
      }
      double expected = before[at], magnitude = std::fabs(expected);
      for (int j = 0; j < num_keys; ++j) {
        const double product = p[r * ld_p + static_cast<std::size_t>(j)] * values.row(j)[i];
        expected += product;
        magnitude += std::fabs(product);
      }
      const double bound = (num_keys + 1) * kUlp * magnitude;
      EXPECT(std::fabs(acc[at] - expected) <= bound,
             "rows %d keys %d dim %d: row %zu dim %zu: %.9g, not %.9g, bound %.3g", num_rows,
             num_keys, dim, r, i, static_cast<double>(acc[at]), expected, bound);
      EXPECT(bits_of(acc[at]) == bits_of(parts[at]),
             "rows %d keys %d dim %d: row %zu dim %zu: other bits when cut at %d", num_rows,
             num_keys, dim, r, i, cut);
    }
}

const Order kOrders[] = {Order::dense, Order::strided, Order::indexed};

void test_attention(const std::string &isa, const Kernels &kernels, const Kernels &scalar) {
  for (int t = 0; t < kNumFormats; ++t) {
    const Format type = static_cast<Format>(t);
    const bool blocks = !format_info(type).plain();
    const std::string of_type = std::string(" ") + format_name(type);
    const auto fits = [&](int dim) { return format_info(type).holds(dim); };
    const auto sweep = [&](auto &&run) {
      Random random(11);
      for (int dim : {1, 4, 8, 17, 32, 64, 80, 96, 128, 256, 512, 544})
        for (int num_rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 33})
          if (fits(dim)) {
            // Every number of keys beside every order, in turn, to keep the sweep short.
            const int num_keys[] = {1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 24, 31, 66};
            const int which = between(random, 0, 14);
            run(random, num_rows, num_keys[which], dim, kOrders[between(random, 0, 2)]);
            run(random, num_rows, num_keys[(which + 5) % 15], dim, kOrders[(which + dim) % 3]);
          }
      for (int num_keys : {1, 3, 7, 8, 16, 17, 48, 130})
        for (int num_rows : {1, 4, 9})
          for (Order order : kOrders)
            run(random, num_rows, num_keys, 64, order);
    };
    const auto fuzz = [&](auto &&run) {
      Random random(20240229);
      for (int i = 0; i < 150; ++i) {
        const int dim = blocks ? 32 * between(random, 1, 8) : between(random, 1, 200);
        run(random, between(random, 1, 12), between(random, 1, 40), dim,
            kOrders[between(random, 0, 2)]);
      }
    };
    const auto qk = [&](Random &random, int num_rows, int num_keys, int dim, Order order) {
      check_qk(isa, kernels, scalar, random, type, num_rows, num_keys, dim, order);
    };
    const auto pv = [&](Random &random, int num_rows, int num_keys, int dim, Order order) {
      check_pv(kernels, scalar, random, type, num_rows, num_keys, dim, order);
    };
    check(isa + " qk" + of_type + " shapes", [&] { sweep(qk); });
    check(isa + " qk" + of_type + " fuzz", [&] { fuzz(qk); });
    check(isa + " pv" + of_type + " shapes", [&] { sweep(pv); });
    check(isa + " pv" + of_type + " fuzz", [&] { fuzz(pv); });
    check(isa + " qk and pv" + of_type + " without keys or rows touch nothing", [&] {
      const Rows none = {nullptr, 0, nullptr};
      float q[32] = {0}, out[32];
      std::fill(out, out + 32, 5.0f);
      const auto qk_fn = kernels.of(type).qk;
      const auto pv_fn = kernels.of(type).pv;
      qk_fn(q, 32, 1, &none, 0, 32, out, 1);
      pv_fn(q, 0, 1, &none, 0, 32, out, 32);
      qk_fn(q, 32, 0, &none, 0, 32, out, 1);
      pv_fn(q, 0, 0, &none, 0, 32, out, 32);
      for (float x : out)
        EXPECT(x == 5.0f, "%g", static_cast<double>(x));
    });
    check(isa + " qk" + of_type + " NaN and infinity reach only their row and key", [&] {
      Random random(13);
      for (int num_rows : {1, 3, 8})
        for (float bad : {kNan, kInf}) {
          const int num_keys = 11, dim = 64;
          RowSet keys(random, type, num_keys, dim, Order::dense, scalar);
          const Rows rows = keys.rows();
          std::vector<float> q(static_cast<std::size_t>(num_rows * dim));
          for (float &x : q)
            x = normal(random);
          const int bad_row = num_rows / 2, bad_key = 6;
          q[static_cast<std::size_t>(bad_row * dim + 40)] = bad;
          char *key = keys.bytes->data() + keys.stride * bad_key;
          const f16_t bad_half = std::isnan(bad) ? 0x7e00 : 0x7c00;
          if (type == Format::f32)
            std::memcpy(key + 4, &bad, 4);
          else if (type == Format::bf16)
            scalar.of(type).from_f32(&bad, key, 1);
          else // a value, or the block's d
            std::memcpy(key, &bad_half, 2);
          std::vector<float> scores(static_cast<std::size_t>(num_rows * num_keys));
          kernels.of(type).qk(q.data(), dim, num_rows, &rows, num_keys, dim, scores.data(),
                              num_keys);
          for (int r = 0; r < num_rows; ++r)
            for (int j = 0; j < num_keys; ++j) {
              const float score = scores[static_cast<std::size_t>(r * num_keys + j)];
              EXPECT(std::isfinite(score) == (r != bad_row && j != bad_key), "row %d key %d: %g", r,
                     j, static_cast<double>(score));
            }
        }
    });
    if (blocks)
      check(isa + " pv" + of_type + " gives the bits that f32 gives on dequantized rows", [&] {
        // The same values in the same order: not a bit of rounding is left to tell apart.
        Random random(17);
        const int num_keys = 40, dim = 128, num_rows = 4;
        const RowSet keys(random, type, num_keys, dim, Order::dense, scalar);
        std::vector<float> unpacked(static_cast<std::size_t>(num_keys * dim));
        const Rows quantized = keys.rows();
        kernels.of(type).to_f32(quantized.base, unpacked.data(), unpacked.size());
        for (std::size_t i = 0; i < unpacked.size(); ++i)
          EXPECT(static_cast<double>(unpacked[i]) == keys.values[i], "value %zu", i);
        std::vector<float> p(static_cast<std::size_t>(num_rows * num_keys));
        for (float &x : p)
          x = std::fabs(normal(random));
        const Rows plain = {unpacked.data(), dim * 4, nullptr};
        std::vector<float> a(static_cast<std::size_t>(num_rows * dim), 0.0f), b = a;
        kernels.of(type).pv(p.data(), num_keys, num_rows, &quantized, num_keys, dim, a.data(), dim);
        kernels.of(Format::f32)
            .pv(p.data(), num_keys, num_rows, &plain, num_keys, dim, b.data(), dim);
        EXPECT(a == b, "some elements differ");
      });
  }
}

// --- one row of scores -------------------------------------------------------------------------

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

// --- dispatch ----------------------------------------------------------------------------------

template <typename F> std::string message_of(F &&f) {
  try {
    f();
  } catch (const std::invalid_argument &error) {
    return error.what();
  }
  return "";
}

void test_dispatch() {
  check("dispatch lists scalar last and always available", [] {
    const std::vector<IsaInfo> isas = compiled_isas();
    EXPECT(!isas.empty() && std::string(isas.back().name) == "scalar" && isas.back().available,
           "compiled");
    const std::vector<std::string> available = available_isas();
    EXPECT(!available.empty() && available.back() == "scalar", "available");
  });
  check("dispatch selects what it is told", [] {
    for (const std::string &name : available_isas()) {
      select_isa(name);
      EXPECT(active_kernels().name == name, "%s", name.c_str());
      EXPECT(&active_kernels() == &kernels_for(name), "%s", name.c_str());
    }
  });
  check("dispatch refuses unknown and missing ISAs and changes nothing", [] {
    select_isa("scalar");
    const std::string message = message_of([] { select_isa("mmx"); });
    EXPECT(message.find("mmx") != std::string::npos && message.find("scalar") != std::string::npos,
           "message: %s", message.c_str());
    EXPECT(!message_of([] { kernels_for(""); }).empty(), "empty name");
    for (const IsaInfo &isa : compiled_isas())
      if (!isa.available)
        EXPECT(message_of([&] { select_isa(isa.name); }).find(isa.requires_) != std::string::npos,
               "%s", isa.name);
    EXPECT(std::string(active_kernels().name) == "scalar", "selection changed");
  });
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  const Kernels &scalar = kernels_for("scalar");
  test_scalar_conversions(scalar);
  test_scalar_quantize(scalar);
  for (const IsaInfo &isa : compiled_isas()) {
    if (!isa.available) {
      std::printf("SKIP %s: needs %s, which this machine lacks\n", isa.name, isa.requires_);
      continue;
    }
    const Kernels &kernels = kernels_for(isa.name);
    EXPECT(std::string(kernels.name) == isa.name, "name of the table of %s", isa.name);
    if (&kernels != &scalar) {
      test_conversions(isa.name, kernels, scalar);
      test_blocks<block_q4_0>(isa.name, kernels, scalar, Format::q4_0);
      test_blocks<block_q8_0>(isa.name, kernels, scalar, Format::q8_0);
      test_blocks<block_iq4_nl>(isa.name, kernels, scalar, Format::iq4_nl);
    }
    test_attention(isa.name, kernels, scalar);
    test_scores(isa.name, kernels);
  }
  test_dispatch();
  return summary();
}
