// How fast this machine reads memory: the roof over every decode step.
#pragma once

#include "benchmark.h"
#include "data.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mixedkv::bench {

/// Sums a buffer of (about) a given size. Workers draw pieces as they do in attention.
class ReadLoop : public Subject {
public:
  explicit ReadLoop(std::size_t bytes);

  std::size_t bytes() const { return memory_.size(); }
  /// The way to read that prepare found to be the fastest.
  const char *way() const;

  /// The first time: tries all ways.
  void prepare(const Context &context) override;
  void run(const Context &context) override;
  float result() const override;

private:
  void read(int way, int threads);

  Memory memory_;
  std::size_t piece_;
  std::int64_t num_pieces_;
  std::vector<std::uint64_t> sums_;
  int way_ = -1;
};

} // namespace mixedkv::bench
