// What mixedkv-bench asks beyond google-benchmark's own options.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mixedkv::bench {

struct Shape {
  int num_qo_heads;
  int num_kv_heads;
  int head_dim;
};

/// "32x8x128".
std::string name_of(const Shape &shape);

struct Options {
  std::vector<std::string> isas; ///< available ones
  std::vector<int> threads;
  std::vector<std::int64_t> kv; ///< empty: each subject's own
  std::vector<Shape> shapes;    ///< likewise
};

/// Takes our own options out of a program's arguments and leaves the rest, which are
/// google-benchmark's. Throws std::invalid_argument where one of them, or MIXEDKV_ISA, is wrong.
Options take_options(std::vector<char *> &arguments);

/// What our own options mean.
extern const char *const kUsage;

/// The numbers or shapes that the user named, else a subject's own.
template <typename T>
std::vector<T> chosen(const std::vector<T> &named, const std::vector<T> &own) {
  return named.empty() ? own : named;
}

} // namespace mixedkv::bench
