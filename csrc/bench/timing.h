// The timing loop.
#pragma once

#include "bandwidth.h"
#include "benchmark.h"

#include <memory>
#include <string>
#include <vector>

namespace mixedkv::bench {

/// Seconds since some moment.
double now();

struct Result {
  std::string name;
  std::string isa; ///< empty: none of ours
  int threads = 1;
  std::size_t bytes = 0;
  double flops = 0;
  double best = 0;   ///< seconds a call
  double median = 0; ///< of all samples
  /// Of a benchmark: where among the group's reads its roof is, and the median over the rounds of
  /// its speed by that roof's, each the best of the round.
  int read = -1;
  double of_read = 0;
  std::string way; ///< of a read
  bool finite = true;
};

struct GroupResults {
  std::string name;
  std::vector<Result> reads; ///< one for each size and number of threads
  std::vector<Result> benchmarks;
};

/// All benchmarks of a group, and the read loops of their sizes, in rounds.
GroupResults measure(const Group &group, const Options &options);

} // namespace mixedkv::bench
