// What tests of quantization share: the levels of IQ4_NL, and blocks of values that go wrong first.
#pragma once

#include "checks.h"

namespace testing {

inline const int kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                1,    13,   25,  38,  53,  69,  89,  113};

/// Rows of 32 that go wrong first.
inline std::vector<std::vector<float>> adversarial_blocks() {
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

} // namespace testing
