#include "registry.h"

#include "bandwidth.h"
#include "kernels/dispatch.h"
#include "runtime/parallel.h"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <stdexcept>
#include <utility>

namespace mixedkv::bench {
namespace {

bool failed = false;

/// The ISA that mixedkv takes by itself.
const std::string &own_isa() {
  static const std::string isa = active_kernels().name;
  return isa;
}

/// What one subject's benchmarks share: the subject, once there is one.
class Shared {
public:
  explicit Shared(MakeSubject make) : make_(std::move(make)) {}
  Subject &get() {
    if (subject_ == nullptr) {
      select_isa(own_isa()); // scalar code would take its time over a long context
      subject_ = make_();
    }
    return *subject_;
  }

private:
  MakeSubject make_;
  std::unique_ptr<Subject> subject_;
};

/// One call, timed, in seconds, after a reset, which is not.
double call(Subject &subject, const Context &context) {
  subject.reset();
  const double begin = now();
  subject.run(context);
  benchmark::ClobberMemory();
  // A clock may stand still for a moment; a speed must stay a number.
  return std::max(now() - begin, 1e-9);
}

/// Calls, so that what fits in cache is there. False where they take so long that they gain
/// nothing.
bool warm_up(Subject &subject, const Context &context) {
  constexpr double kWarmSeconds = 0.005;
  constexpr double kLongSeconds = 0.02;
  double last = 0;
  for (double spent = 0; spent < kWarmSeconds; spent += last) {
    last = call(subject, context);
  }
  return last < kLongSeconds;
}

void repeat(benchmark::State &state, Subject &subject, const Context &context, const Work &work,
            bool &worth_warming) {
  // Just before each repetition, so that clocks and caches that drift do so for both.
  const double read = read_speed(work.bytes, context.threads);
  select_isa(context.kernels->name);
  set_num_threads(context.threads);
  subject.prepare(context);
  if (worth_warming) {
    worth_warming = warm_up(subject, context);
  }
  if (work.resets) {
    for (auto _ : state) {
      state.SetIterationTime(call(subject, context));
    }
  } else {
    for (auto _ : state) {
      subject.run(context);
      benchmark::ClobberMemory();
    }
  }
  float result = subject.result();
  benchmark::DoNotOptimize(result);
  if (!std::isfinite(result)) {
    throw std::runtime_error("the result is not a number");
  }
  using benchmark::Counter;
  const double bytes = static_cast<double>(work.bytes);
  constexpr Counter::Flags per_second = Counter::kIsIterationInvariantRate;
  state.counters["GB/s"] = Counter(bytes * 1e-9, per_second);
  state.counters["of_read"] = Counter(bytes / read, per_second);
  state.counters["read_GB/s"] = Counter(read * 1e-9);
  state.counters["Gop/s"] = Counter(work.ops * 1e-9, per_second);
}

void add(const std::string &name, const Context &context, const Work &work,
         const std::shared_ptr<Shared> &shared) {
  const std::string full = name + "/threads=" + std::to_string(context.threads);
  bool worth_warming = true;
  auto *const added =
      benchmark::RegisterBenchmark(full.c_str(), [=](benchmark::State &state) mutable {
        try {
          repeat(state, shared->get(), context, work, worth_warming);
        } catch (const std::exception &error) {
          failed = true;
          state.SkipWithError(error.what());
        }
      });
  added->Unit(benchmark::kMicrosecond);
  // The main thread's own time says little where a pool works for it.
  work.resets ? added->UseManualTime() : added->UseRealTime();
}

} // namespace

void add_benchmarks(const Options &options, const std::string &name, const Work &work,
                    const MakeSubject &make) {
  const auto shared = std::make_shared<Shared>(make);
  for (const std::string &isa : options.isas) {
    for (const int threads : options.threads) {
      add(name + "/" + isa, {&kernels_for(isa), threads}, work, shared);
    }
  }
}

void add_foreign_benchmarks(const Options &options, const std::string &name, const Work &work,
                            const MakeSubject &make) {
  const auto shared = std::make_shared<Shared>(make);
  for (const int threads : options.threads) {
    add(name, {&kernels_for(own_isa()), threads}, work, shared);
  }
}

bool any_failed() { return failed; }

} // namespace mixedkv::bench
