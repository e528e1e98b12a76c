#include "timing.h"

#include "../kernels/dispatch.h"
#include "../parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <utility>

namespace mixedkv::bench {
namespace {

constexpr int kMinRounds = 2;
constexpr int kMaxRounds = 10;
constexpr double kSecondsPerTurn = 0.02;
/// Calls that take longer get nothing from a call before them in the same turn.
constexpr double kWarmSeconds = 0.02;
/// Shorter calls are timed several at once.
constexpr double kSampleSeconds = 20e-6;

/// The compiler must take it that all memory is read and written here.
void keep_results() {
#if defined(__GNUC__)
  asm volatile("" : : : "memory");
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

double median_of(std::vector<double> x) {
  const auto middle = x.begin() + static_cast<std::ptrdiff_t>(x.size() / 2);
  std::nth_element(x.begin(), middle, x.end());
  if (x.size() % 2 != 0) {
    return *middle;
  }
  return (*std::max_element(x.begin(), middle) + *middle) / 2;
}

class Contender {
public:
  Contender(const Benchmark &benchmark, const std::string &own_isa)
      : subject_(benchmark.make()), context_{&kernels_for(benchmark.isa.empty() ? own_isa
                                                                                : benchmark.isa),
                                             benchmark.threads} {}

  /// Timed for about this many seconds, and one sample at least.
  void turn(double seconds) {
    select_isa(context_.kernels->name);
    set_num_threads(context_.threads);
    subject_->prepare(context_);
    if (calls_ == 0) { // for a first touch of what run itself allocates
      sample(1);
      const double once = sample(1);
      calls_ = subject_->resets() ? 1 : static_cast<int>(std::ceil(kSampleSeconds / once));
      calls_ = std::clamp(calls_, 1, 1 << 16);
      last_ = once;
    }
    if (last_ < kWarmSeconds) {
      const double until = now() + std::min(seconds / 2, 0.25 * kWarmSeconds);
      do {
        sample(calls_);
      } while (now() < until);
    }
    double best = 0;
    const double until = now() + seconds;
    do {
      last_ = sample(calls_);
      samples_.push_back(last_);
      best = best == 0 ? last_ : std::min(best, last_);
    } while (now() < until);
    rounds_.push_back(best);
    finite_ = finite_ && std::isfinite(subject_->result());
  }

  const std::vector<double> &rounds() const { return rounds_; }
  void report(Result &result) const {
    result.best = *std::min_element(rounds_.begin(), rounds_.end());
    result.median = median_of(samples_);
    result.finite = finite_;
  }

private:
  /// Seconds a call.
  double sample(int calls) {
    if (subject_->resets()) {
      subject_->reset();
    }
    const double begin = now();
    for (int i = 0; i < calls; ++i) {
      subject_->run(context_);
      keep_results();
    }
    // A clock may stand still for a moment; a speed must stay a number.
    return std::max(now() - begin, 1e-9) / calls;
  }

  std::shared_ptr<Subject> subject_;
  Context context_;
  int calls_ = 0;
  double last_ = 0;
  std::vector<double> samples_;
  std::vector<double> rounds_; ///< the best of each
  bool finite_ = true;
};

} // namespace

double now() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

GroupResults measure(const Group &group, const Options &options) {
  // Data are made with the ISA that is active, once and for all the best.
  static const std::string own_isa = active_kernels().name;
  select_isa(own_isa);
  GroupResults results;
  results.name = group.name;

  std::vector<Contender> contenders;
  std::vector<std::shared_ptr<ReadLoop>> loops;
  for (const Benchmark &benchmark : group.benchmarks) {
    Result result;
    result.name = benchmark.name();
    result.isa = benchmark.isa;
    result.threads = benchmark.threads;
    result.bytes = benchmark.bytes;
    result.flops = benchmark.flops;
    const auto same = [&](const Result &read) {
      // Within a page's rounding; cold tiers differ by their own query's token.
      const double ratio = static_cast<double>(read.bytes) / static_cast<double>(benchmark.bytes);
      return read.threads == benchmark.threads && ratio > 0.99 && ratio < 1.01;
    };
    auto read = std::find_if(results.reads.begin(), results.reads.end(), same);
    result.read = static_cast<int>(read - results.reads.begin());
    if (read == results.reads.end()) {
      auto loop = std::make_shared<ReadLoop>(benchmark.bytes);
      Result roof;
      roof.bytes = loop->bytes();
      roof.threads = benchmark.threads;
      roof.name = "read/" + std::to_string(roof.bytes) + "/threads=" + std::to_string(roof.threads);
      results.reads.push_back(roof);
      loops.push_back(std::move(loop));
    }
    results.benchmarks.push_back(std::move(result));
  }
  for (const std::shared_ptr<ReadLoop> &loop : loops) {
    Benchmark read;
    read.threads = results.reads[contenders.size()].threads;
    read.make = [loop] { return loop; };
    contenders.emplace_back(read, own_isa);
  }
  for (const Benchmark &benchmark : group.benchmarks) {
    contenders.emplace_back(benchmark, own_isa);
  }

  const double turns = options.min_time / kSecondsPerTurn;
  const int num_rounds = static_cast<int>(std::clamp<double>(turns, kMinRounds, kMaxRounds));
  for (int round = 0; round < num_rounds; ++round) {
    // Each round begins with another one.
    for (std::size_t i = 0; i < contenders.size(); ++i) {
      const std::size_t first = contenders.size() * static_cast<std::size_t>(round) /
                                static_cast<std::size_t>(num_rounds);
      contenders[(first + i) % contenders.size()].turn(options.min_time / num_rounds);
    }
  }

  const std::size_t num_reads = results.reads.size();
  for (std::size_t i = 0; i < num_reads; ++i) {
    contenders[i].report(results.reads[i]);
    results.reads[i].way = loops[i]->way();
  }
  for (std::size_t i = 0; i < results.benchmarks.size(); ++i) {
    Result &result = results.benchmarks[i];
    const Contender &contender = contenders[num_reads + i];
    contender.report(result);
    const std::size_t read = static_cast<std::size_t>(result.read);
    std::vector<double> shares;
    for (std::size_t round = 0; round < contender.rounds().size(); ++round) {
      shares.push_back(
          static_cast<double>(result.bytes) / contender.rounds()[round] /
          (static_cast<double>(results.reads[read].bytes) / contenders[read].rounds()[round]));
    }
    result.of_read = median_of(std::move(shares));
  }
  select_isa(own_isa);
  return results;
}

} // namespace mixedkv::bench
