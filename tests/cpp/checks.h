// What tests of kernels share: the values of halves and of Q4_0 blocks by their
// definitions, buffers that end where their allocation ends or lie between guard bytes, and random
// numbers.
#pragma once

#include "mixedkv/formats.h"
#include "reporting.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace testing {

using mixedkv::block_q4_0;
using mixedkv::f16_t;

// --- bits and numbers ----------------------------------------------------------------------------

constexpr double kUlp = FLT_EPSILON / 2; // largest relative error of one f32 rounding
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

/// By definition; exact. Not for infinities and NaNs.
inline double value_of_half(f16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}

inline double value_of_q4(const block_q4_0 &block, int i) {
  const int q = i < 16 ? block.qs[i] & 15 : block.qs[i - 16] >> 4;
  return (q - 8) * value_of_half(block.d);
}

// --- buffers -------------------------------------------------------------------------------------

/// n values that begin `misalignment` values past an allocation of exactly that size.
template <typename T> class Input {
public:
  Input(std::size_t n, std::size_t misalignment)
      : storage_(new char[(n + misalignment) * sizeof(T)]),
        data_(reinterpret_cast<T *>(storage_.get()) + misalignment), size_(n) {}
  T *data() { return data_; }
  const T *data() const { return data_; }
  T &operator[](std::size_t i) { return data_[i]; }
  const T &operator[](std::size_t i) const { return data_[i]; }
  std::size_t size() const { return size_; }

private:
  std::unique_ptr<char[]> storage_;
  T *data_;
  std::size_t size_;
};

/// n values between 64 guard bytes on either side.
template <typename T> class Output {
public:
  Output(std::size_t n, std::size_t misalignment)
      : bytes_(2 * kGuard + (n + misalignment) * sizeof(T), kPattern),
        first_(kGuard + misalignment * sizeof(T)), size_(n) {}
  T *data() { return reinterpret_cast<T *>(bytes_.data() + first_); }
  T &operator[](std::size_t i) { return data()[i]; }
  std::size_t size() const { return size_; }
  bool guards_intact() const {
    const std::size_t end = first_ + size_ * sizeof(T);
    const auto untouched = [](unsigned char byte) { return byte == kPattern; };
    return std::all_of(bytes_.begin(), bytes_.begin() + static_cast<std::ptrdiff_t>(first_),
                       untouched) &&
           std::all_of(bytes_.begin() + static_cast<std::ptrdiff_t>(end), bytes_.end(), untouched);
  }

private:
  static constexpr std::size_t kGuard = 64;
  static constexpr unsigned char kPattern = 0xa5;
  std::vector<unsigned char> bytes_;
  std::size_t first_, size_;
};

using Random = std::mt19937;

inline float normal(Random &random) { return std::normal_distribution<float>()(random); }
inline int between(Random &random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

} // namespace testing
