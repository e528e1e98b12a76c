// The worker pool, and how many CPUs it may use. Built with -fsanitize=thread as well.
#include "reporting.h"
#include "runtime/cpu_count.h"
#include "runtime/parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <new>
#include <string>
#include <thread>
#include <vector>

// Sanitizers bring allocation functions of their own, which can't be replaced.
#if defined(__has_feature)
#define MIXEDKV_HAS_FEATURE(x) __has_feature(x)
#else
#define MIXEDKV_HAS_FEATURE(x) 0
#endif
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__) &&                             \
    !MIXEDKV_HAS_FEATURE(thread_sanitizer) && !MIXEDKV_HAS_FEATURE(address_sanitizer)
#define MIXEDKV_OWN_ALLOCATION 1

namespace {
std::atomic<bool> out_of_memory{false};
} // namespace

// Allocations of arrays aligned beyond the usual fail on demand: those of the pool's runs.
void *operator new[](std::size_t n, std::align_val_t alignment, const std::nothrow_t &) noexcept {
  const std::size_t a = static_cast<std::size_t>(alignment);
  return out_of_memory ? nullptr : std::aligned_alloc(a, (n + a - 1) / a * a);
}
void *operator new[](std::size_t n, std::align_val_t alignment) {
  void *p = operator new[](n, alignment, std::nothrow);
  if (p == nullptr) {
    throw std::bad_alloc();
  }
  return p;
}
void operator delete[](void *p, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void *p, std::size_t, std::align_val_t) noexcept { std::free(p); }
#endif

namespace {

using mixedkv::cgroup_cpus;
using mixedkv::parallel_for;

/// Every unit once; a worker's number below num_threads and nobody else's meanwhile.
bool runs_all(int num_units, int num_threads) {
  std::vector<std::atomic<int>> done(static_cast<std::size_t>(num_units));
  std::vector<std::atomic<int>> inside(static_cast<std::size_t>(num_threads));
  std::atomic<bool> fine{true};
  parallel_for(num_units, num_threads, [&](std::int64_t unit, int worker) {
    if (worker < 0 || worker >= num_threads) {
      fine = false;
      return;
    }
    std::atomic<int> &own = inside[static_cast<std::size_t>(worker)];
    if (own.fetch_add(1) != 0) {
      fine = false;
    }
    ++done[static_cast<std::size_t>(unit)];
    --own;
  });
  for (const std::atomic<int> &times : done) {
    REQUIRE(times == 1);
  }
  return fine;
}

/// Jobs of all sizes, some after the workers have gone to sleep.
bool many_jobs(int rounds) {
  for (int i = 0; i < rounds; ++i) {
    REQUIRE(runs_all(1 + i * 7919 % 97, 1 + i * 31 % 9));
    if (i % 100 == 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  return true;
}

bool no_units() {
  bool called = false;
  parallel_for(0, 4, [&](std::int64_t) { called = true; });
  return !called;
}

bool more_threads_than_units() { return runs_all(3, 64) && runs_all(1, 64); }

bool several_callers() {
  std::atomic<bool> fine{true};
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([&] { fine = many_jobs(700) && fine; });
  }
  for (std::thread &caller : callers) {
    caller.join();
  }
  return fine;
}

/// The pool is busy with the caller's own job: the inner one is done by that thread alone.
bool jobs_inside_jobs() {
  std::atomic<int> sum{0};
  std::atomic<bool> fine{true};
  parallel_for(8, 4, [&](std::int64_t) {
    const std::thread::id self = std::this_thread::get_id();
    parallel_for(5, 4, [&](std::int64_t unit, int worker) {
      fine = fine && worker == 0 && std::this_thread::get_id() == self;
      sum += static_cast<int>(unit);
    });
  });
  REQUIRE(sum == 8 * 10);
  return fine;
}

/// Workers other than the caller's that took part in any of several jobs of long units.
int helpers_seen() {
  std::atomic<int> seen{0};
  for (int i = 0; i < 200 && seen == 0; ++i) {
    parallel_for(4, 2, [&](std::int64_t, int worker) {
      seen = std::max(seen.load(), worker);
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    });
  }
  return seen;
}

#if defined(MIXEDKV_OWN_ALLOCATION)
/// Where there is no memory for more threads' runs the caller works alone; the pool lives on.
bool survives_lack_of_memory() {
  out_of_memory = true;
  const bool alone = runs_all(2000, 1000);
  out_of_memory = false;
  REQUIRE(alone);
  return helpers_seen() == 1;
}
#endif

// --- CPUs
// -------------------------------------------------------------------------------------------

/// A directory that looks like /sys/fs/cgroup, and a file like /proc/self/cgroup.
class Groups {
public:
  Groups() {
    char name[] = "/tmp/mixedkv-cgroup-XXXXXX";
    root_ = mkdtemp(name);
  }
  Groups(const Groups &) = delete;
  Groups &operator=(const Groups &) = delete;
  ~Groups() { std::filesystem::remove_all(root_); }
  void write(const std::string &path, const std::string &text) const {
    const std::filesystem::path file = root_ / path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text << '\n';
  }
  int cpus(const std::string &self) const {
    write("self", self);
    return cgroup_cpus(root_ / "self", root_ / "fs");
  }

private:
  std::filesystem::path root_;
};

bool quota_of_v2() {
  const Groups groups;
  groups.write("fs/cpu.max", "max 100000");
  groups.write("fs/a/cpu.max", "250000 100000");
  groups.write("fs/a/b/cpu.max", "max 100000");
  groups.write("fs/a/c/cpu.max", "50000 100000");
  REQUIRE(groups.cpus("0::/") == 0);
  REQUIRE(groups.cpus("0::/a") == 3);
  REQUIRE(groups.cpus("0::/a/b") == 3); // the group above is the strictest
  REQUIRE(groups.cpus("0::/a/c") == 1);
  REQUIRE(groups.cpus("0::/a/not/here") == 3); // seen from another namespace
  REQUIRE(groups.cpus("0::/elsewhere") == 0);
  return true;
}

bool quota_of_v1() {
  const Groups groups;
  groups.write("fs/cpu,cpuacct/cpu.cfs_quota_us", "-1");
  groups.write("fs/cpu,cpuacct/cpu.cfs_period_us", "100000");
  groups.write("fs/cpu,cpuacct/job/cpu.cfs_quota_us", "150000");
  groups.write("fs/cpu,cpuacct/job/cpu.cfs_period_us", "100000");
  REQUIRE(groups.cpus("4:memory:/job\n3:cpu,cpuacct:/job") == 2);
  REQUIRE(groups.cpus("4:memory:/job\n3:cpu,cpuacct:/") == 0);
  REQUIRE(groups.cpus("4:memory:/job\n5:cpuset:/job") == 0);
  return true;
}

bool senseless_groups() {
  const Groups groups;
  for (const char *text : {"", "0 0", "100000 0", "-5 100000", "a b", "100000"}) {
    groups.write("fs/cpu.max", text);
    REQUIRE(groups.cpus("0::/") == 0);
  }
  REQUIRE(groups.cpus("") == 0 && groups.cpus("nonsense") == 0);
  groups.write("fs/cpu.max", "1e300 1");
  REQUIRE(groups.cpus("0::/") == 1000000);
  REQUIRE(cgroup_cpus("/nowhere/at/all", "/nowhere") == 0);
  REQUIRE(mixedkv::usable_cpus() >= 1);
  return true;
}

} // namespace

int main() {
  testing::report("parallel_for runs every unit once", many_jobs(3000));
  testing::report("parallel_for without units", no_units());
  testing::report("parallel_for with more threads than units", more_threads_than_units());
  testing::report("parallel_for from several threads at once", several_callers());
  testing::report("parallel_for inside parallel_for", jobs_inside_jobs());
  testing::report("parallel_for wakes a worker", helpers_seen() == 1);
#if defined(MIXEDKV_OWN_ALLOCATION)
  testing::report("parallel_for survives a lack of memory", survives_lack_of_memory());
#else
  std::printf("skip parallel_for survives a lack of memory: a sanitizer allocates\n");
#endif
  testing::report("CPUs of a cgroup v2", quota_of_v2());
  testing::report("CPUs of a cgroup v1", quota_of_v1());
  testing::report("CPUs of cgroups that make no sense", senseless_groups());
  return testing::summary();
}
