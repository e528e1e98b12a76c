// mixedkv-bench: how fast the parts are, beside the read bandwidth of the same run.
#include "benchmark.h"
#include "report.h"
#include "timing.h"

#include <cstdio>
#include <exception>
#include <vector>

namespace {

using namespace mixedkv::bench;

enum : int { kSuccess = 0, kFailure = 1, kWrongUse = 2 };

int run(const Options &options) {
  std::vector<Group> groups;
  add_attention_groups(options, groups);
  add_conversion_groups(options, groups);
  add_kernel_groups(options, groups);
  bool any = false;
  for (const Group &group : groups) {
    any |= !group.benchmarks.empty();
  }
  if (!any) {
    std::fprintf(stderr, "mixedkv-bench: no benchmark of that name; --list shows them\n");
    return kWrongUse;
  }
  if (options.list) {
    for (const Group &group : groups) {
      for (const Benchmark &benchmark : group.benchmarks) {
        std::printf("%s\n", benchmark.name().c_str());
      }
    }
    return kSuccess;
  }

  if (!options.json) {
    print_header(stdout);
  }
  bool finite = true;
  std::vector<GroupResults> all;
  for (const Group &group : groups) {
    if (group.benchmarks.empty()) {
      continue;
    }
    all.push_back(measure(group, options));
    for (const Result &result : all.back().benchmarks) {
      finite &= result.finite;
    }
    if (!options.json) {
      print_table(stdout, all.back());
    }
  }
  if (options.json) {
    print_json(stdout, options, all);
  }
  if (!finite) {
    std::fprintf(stderr, "mixedkv-bench: a result is not a number\n");
    return kFailure;
  }
  return kSuccess;
}

} // namespace

int main(int argc, char **argv) {
  Options options;
  try {
    options = parse_options(argc, argv);
  } catch (const std::exception &error) {
    std::fprintf(stderr, "mixedkv-bench: %s\n\n%s", error.what(), kUsage);
    return kWrongUse;
  }
  if (options.help) {
    std::fputs(kUsage, stdout);
    return kSuccess;
  }
  try {
    return run(options);
  } catch (const std::exception &error) {
    std::fprintf(stderr, "mixedkv-bench: %s\n", error.what());
    return kFailure;
  }
}
