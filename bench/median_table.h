// What the user reads.
#pragma once

#include <benchmark/benchmark.h>

#include <memory>
#include <vector>

namespace mixedkv::bench {

/// google-benchmark's console table, of whose statistics it shows the median alone, and its rows in
/// the order of registration: repetitions that take turns at random end at random.
class MedianTable : public benchmark::BenchmarkReporter {
public:
  explicit MedianTable(std::unique_ptr<benchmark::BenchmarkReporter> console);

  bool ReportContext(const Context &context) override;
  void ReportRuns(const std::vector<Run> &runs) override;
  void Finalize() override;

private:
  std::unique_ptr<benchmark::BenchmarkReporter> console_;
  std::vector<Run> runs_;
};

} // namespace mixedkv::bench
