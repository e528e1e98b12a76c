// The command line of mixedkv-bench.
#pragma once

#include <cstdint>
#include <regex>
#include <stdexcept>
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
  bool help = false;
  bool list = false;
  bool json = false;
  double min_time = 0.2;         ///< seconds that each benchmark is timed in all
  std::regex filter{""};         ///< of names; the default finds every one
  std::vector<std::string> isas; ///< available ones
  std::vector<int> threads;
  std::vector<std::int64_t> kv; ///< empty: each subject's own
  std::vector<Shape> shapes;    ///< likewise
};

/// Wrong use, in words for the user.
struct UsageError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

/// Throws UsageError; std::invalid_argument where the environment names what this machine lacks.
Options parse_options(int argc, const char *const *argv);

extern const char *const kUsage;

} // namespace mixedkv::bench
