// A job is opened and closed by its caller. Its units are cut into as many runs as threads may take
// part. Workers that are awake join an open job and draw units, each from a run of its own and then
// from what is left of the others'; the caller draws too, closes the job when no unit is left, and
// waits only for workers that joined. A worker that wakes up late finds the job closed and touches
// nothing, so a sleeping worker never delays its caller.
#include "runtime/parallel.h"

#include "runtime/cpu_count.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace mixedkv {
namespace {

constexpr int kMaxThreads = 1024;
/// How long an idle worker polls before it sleeps: decode steps follow one another within
/// microseconds, and waking a sleeper costs more than the polling.
constexpr int kSpins = 4000;

inline void pause_cpu() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
public:
  /// False where there is no memory for it; nothing was done then.
  bool run(std::int64_t num_units, int helpers, void (*fn)(void *, std::int64_t, int),
           void *context) {
    if (!ensure_runs(helpers + 1)) {
      return false;
    }
    ensure_workers(helpers);
    fn_ = fn;
    context_ = context;
    cut(num_units, helpers + 1);
    tickets_.store(helpers, std::memory_order_relaxed);
    epoch_.fetch_add(1); // odd: open
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      for (int i = 0; i < helpers; ++i) {
        wake_.notify_one(); // no more than can help
      }
    }
    draw(0);
    epoch_.fetch_add(1); // even: closed
    for (int spins = 0; in_flight_.load() != 0; ++spins) {
      if (spins < kSpins) {
        pause_cpu();
      } else {
        std::this_thread::yield();
      }
    }
    return true;
  }

  std::atomic_flag busy = ATOMIC_FLAG_INIT;

private:
  /// Units of a job that one thread draws first. A cache line each: their threads write to them.
  struct alignas(64) Run {
    std::atomic<std::int64_t> next{0};
    std::int64_t end = 0;
  };

  // The two are called between jobs only: no worker looks at runs then.

  bool ensure_runs(int wanted) {
    if (wanted > capacity_) {
      Run *fresh = new (std::nothrow) Run[static_cast<std::size_t>(wanted)];
      if (fresh == nullptr) {
        return false;
      }
      runs_.reset(fresh);
      capacity_ = wanted;
    }
    return true;
  }

  void cut(std::int64_t num_units, int num_runs) {
    num_runs_ = num_runs;
    for (int i = 0; i < num_runs; ++i) {
      runs_[i].next.store(num_units * i / num_runs, std::memory_order_relaxed);
      runs_[i].end = num_units * (i + 1) / num_runs;
    }
  }

  void draw(int worker) {
    for (int i = 0; i < num_runs_; ++i) {
      Run &run = runs_[(worker + i) % num_runs_];
      while (run.next.load(std::memory_order_relaxed) < run.end) {
        const std::int64_t unit = run.next.fetch_add(1, std::memory_order_relaxed);
        if (unit < run.end) {
          fn_(context_, unit, worker);
        }
      }
    }
  }

  void ensure_workers(int wanted) {
    while (num_workers_ < wanted) {
      try {
        std::thread([this] { work(); }).detach();
      } catch (const std::exception &) {
        return; // no more threads, or no memory for them: fewer do the work
      }
      ++num_workers_;
    }
  }

  void work() {
    std::uint64_t seen = 0;
    for (;;) {
      std::uint64_t epoch = epoch_.load();
      for (int spins = 0; (epoch == seen || epoch % 2 == 0) && spins < kSpins; ++spins) {
        pause_cpu();
        epoch = epoch_.load();
      }
      if (epoch == seen || epoch % 2 == 0) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return epoch_.load() != epoch; });
        sleepers_.fetch_sub(1);
        // The job that woke it may be over by now, but where there was one there will be more:
        // it polls again rather than sleep through them all.
        continue;
      }
      seen = epoch;
      // Join first, then look whether the job is still the open one: a closing caller sees either
      // the join, and waits, or leaves before this worker reads anything of the job.
      in_flight_.fetch_add(1);
      if (epoch_.load() == epoch) {
        const int ticket = tickets_.fetch_sub(1);
        if (ticket > 0) {
          draw(ticket);
        }
      }
      in_flight_.fetch_sub(1);
    }
  }

  void (*fn_)(void *, std::int64_t, int) = nullptr;
  void *context_ = nullptr;
  std::unique_ptr<Run[]> runs_;
  int capacity_ = 0;
  int num_runs_ = 0;
  int num_workers_ = 0;
  alignas(64) std::atomic<std::uint64_t> epoch_{0};
  alignas(64) std::atomic<int> in_flight_{0};
  std::atomic<int> tickets_{0};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// The pool is never destroyed: its workers are detached and may outlive static destructors. A
// forked child has none of the workers, so it drops the pool and starts anew when asked.
std::atomic<Pool *> pool{nullptr};

Pool &get_pool() {
  static std::mutex creation;
  Pool *p = pool.load();
  if (p == nullptr) {
    std::lock_guard<std::mutex> lock(creation);
    p = pool.load();
    if (p == nullptr) {
#if defined(__unix__) || defined(__APPLE__)
      static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
      (void)registered;
#endif
      p = new Pool;
      pool.store(p);
    }
  }
  return *p;
}

int default_num_threads() {
  const char *text = std::getenv("MIXEDKV_NUM_THREADS");
  if (text == nullptr || *text == '\0') {
    return std::min(usable_cpus(), kMaxThreads);
  }
  char *end = nullptr;
  errno = 0;
  const long n = std::strtol(text, &end, 10);
  if (errno != 0 || *end != '\0' || n < 1 || n > kMaxThreads) {
    throw std::invalid_argument("MIXEDKV_NUM_THREADS must be a number from 1 to " +
                                std::to_string(kMaxThreads) + ", got '" + text + "'");
  }
  return static_cast<int>(n);
}

std::atomic<int> num_threads_setting{0};

} // namespace

int get_num_threads() {
  int n = num_threads_setting.load(std::memory_order_relaxed);
  if (n == 0) {
    n = default_num_threads();
    num_threads_setting.store(n, std::memory_order_relaxed);
  }
  return n;
}

void set_num_threads(int n) {
  if (n < 1 || n > kMaxThreads) {
    throw std::invalid_argument("num_threads must be from 1 to " + std::to_string(kMaxThreads) +
                                ", got " + std::to_string(n));
  }
  num_threads_setting.store(n, std::memory_order_relaxed);
}

void parallel_for(std::int64_t num_units, int num_threads, void (*fn)(void *, std::int64_t, int),
                  void *context) {
  const int helpers =
      static_cast<int>(std::min<std::int64_t>(std::min(num_threads, kMaxThreads), num_units)) - 1;
  if (helpers > 0) {
    Pool &p = get_pool();
    if (!p.busy.test_and_set(std::memory_order_acquire)) {
      const bool done = p.run(num_units, helpers, fn, context);
      p.busy.clear(std::memory_order_release);
      if (done) {
        return;
      }
    }
  }
  for (std::int64_t unit = 0; unit < num_units; ++unit) {
    fn(context, unit, 0);
  }
}

} // namespace mixedkv
