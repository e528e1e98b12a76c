#include "median_table.h"

#include <algorithm>
#include <cstddef>
#include <utility>

namespace mixedkv::bench {
namespace {

/// What google-benchmark appends to a name whose time is a clock's; the table goes without it.
constexpr std::size_t kTimeSuffix = sizeof "/real_time" - 1;

} // namespace

MedianTable::MedianTable(std::unique_ptr<benchmark::BenchmarkReporter> console)
    : console_(std::move(console)) {}

bool MedianTable::ReportContext(const Context &context) {
  Context narrower = context;
  narrower.name_field_width -= std::min(narrower.name_field_width, kTimeSuffix);
  return console_->ReportContext(narrower);
}

void MedianTable::ReportRuns(const std::vector<Run> &runs) {
  for (Run run : runs) {
    if (!run.aggregate_name.empty() && run.aggregate_name != "median") {
      continue;
    }
    run.run_name.time_type.clear();
    for (auto &named : run.counters) {
      named.second.flags = benchmark::Counter::kDefaults; // no "/s" after GB/s
    }
    runs_.push_back(std::move(run));
  }
}

void MedianTable::Finalize() {
  std::stable_sort(runs_.begin(), runs_.end(), [](const Run &left, const Run &right) {
    return left.family_index < right.family_index;
  });
  console_->ReportRuns(runs_);
  console_->Finalize();
}

} // namespace mixedkv::bench
