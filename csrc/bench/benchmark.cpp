#include "benchmark.h"

#include <utility>

namespace mixedkv::bench {

std::string Benchmark::name() const {
  return subject_name + (isa.empty() ? "" : "/" + isa) + "/threads=" + std::to_string(threads);
}

GroupBuilder::GroupBuilder(const Options &options, std::string name) : options_(options) {
  group_.name = std::move(name);
}

void GroupBuilder::add_each(const std::string &subject_name, const std::vector<std::string> &isas,
                            std::size_t bytes, double flops,
                            std::function<std::shared_ptr<Subject>()> make) {
  for (const std::string &isa : isas) {
    for (const int threads : options_.threads) {
      Benchmark benchmark{subject_name, isa, threads, bytes, flops, make};
      if (std::regex_search(benchmark.name(), options_.filter)) {
        group_.benchmarks.push_back(std::move(benchmark));
      }
    }
  }
}

float sum_of(const float *x, std::size_t n) {
  float sum = 0;
  for (std::size_t i = 0; i < n; ++i) {
    sum += x[i];
  }
  return sum;
}

} // namespace mixedkv::bench
