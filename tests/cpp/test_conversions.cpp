// Kernels that convert f16 and bf16 or look through rows, of every instruction set that this
// machine can run: against the scalar table bit for bit, and the scalar table against definitions.
// Lengths run around the width of a vector, pointers are misaligned, outputs lie between guard
// bytes, inputs end where their allocation ends, so that a sanitizer sees any step beyond.
//
// Usage: test_conversions [part of a check's name]

#include "kernel_cases.h"

using namespace mixedkv;
using namespace testing;

namespace {

// --- the scalar table against definitions -----------------------------------------------------

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

// --- every ISA against the scalar table, bit for bit ------------------------------------------

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

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  const Kernels &scalar = kernels_for("scalar");
  test_scalar_conversions(scalar);
  on_each_isa([&](const std::string &isa, const Kernels &kernels) {
    if (&kernels != &scalar)
      test_conversions(isa, kernels, scalar);
  });
  return summary();
}
