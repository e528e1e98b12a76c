// mixedkv-bench: how fast the parts are, beside the read bandwidth of the same run.
#include "median_table.h"
#include "options.h"
#include "registry.h"

#include "kernels/dispatch.h"

#include <benchmark/benchmark.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

namespace {

using namespace mixedkv::bench;

enum : int { kSuccess = 0, kFailure = 1, kWrongUse = 2 };

/// Before the user's, whose word is the last: repetitions that take turns, and their median.
const char *const kDefaults[] = {"--benchmark_enable_random_interleaving=true",
                                 "--benchmark_repetitions=10", "--benchmark_min_time=0.02",
                                 "--benchmark_display_aggregates_only=true",
                                 "--benchmark_counters_tabular=true"};

bool asked_for_help = false;

/// google-benchmark calls this for --help, but for values that it can't read as well.
void print_help() {
  std::fputs(kUsage, stdout);
  benchmark::PrintDefaultHelp();
  std::exit(asked_for_help ? kSuccess : kWrongUse);
}

void describe_build() {
#if defined(__clang__)
  benchmark::AddCustomContext("compiler", __VERSION__);
#elif defined(__GNUC__)
  benchmark::AddCustomContext("compiler", "gcc " __VERSION__);
#endif
  std::string isas;
  for (const std::string &isa : mixedkv::available_isas()) {
    isas += (isas.empty() ? "" : " ") + isa;
  }
  benchmark::AddCustomContext("instruction sets here", isas);
}

/// How many benchmarks there were to run or list.
std::size_t run() {
  std::unique_ptr<benchmark::BenchmarkReporter> display(benchmark::CreateDefaultDisplayReporter());
  if (dynamic_cast<benchmark::ConsoleReporter *>(display.get()) != nullptr) {
    display = std::make_unique<MedianTable>(std::move(display));
  }
  return benchmark::RunSpecifiedBenchmarks(display.get());
}

} // namespace

int main(int argc, char **argv) {
  std::vector<std::string> defaults(std::begin(kDefaults), std::end(kDefaults));
  std::vector<char *> arguments = {argv[0]};
  for (std::string &option : defaults) {
    arguments.push_back(option.data());
  }
  for (int i = 1; i < argc; ++i) {
    asked_for_help |= std::strcmp(argv[i], "--help") == 0;
    arguments.push_back(argv[i]);
  }
  Options options;
  try {
    options = take_options(arguments);
  } catch (const std::exception &error) {
    std::fprintf(stderr, "mixedkv-bench: %s\n\n%s", error.what(), kUsage);
    return kWrongUse;
  }
  int count = static_cast<int>(arguments.size());
  arguments.push_back(nullptr);
  benchmark::Initialize(&count, arguments.data(), print_help);
  if (benchmark::ReportUnrecognizedArguments(count, arguments.data())) {
    return kWrongUse;
  }
  describe_build();
  add_read_benchmarks(options);
  add_attention_benchmarks(options);
  add_conversion_benchmarks(options);
  add_kernel_benchmarks(options);
  if (run() == 0) {
    return kWrongUse;
  }
  return any_failed() ? kFailure : kSuccess;
}
