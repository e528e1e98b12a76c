#include "runtime/cpu_count.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace mixedkv {
namespace {

/// quota / period, or 0 where either is missing, unlimited ("max", or -1 in v1) or senseless.
double share(const std::string &quota, const std::string &period) {
  std::istringstream q(quota);
  std::istringstream p(period);
  double a = 0;
  double b = 0;
  return q >> a && p >> b && a > 0 && b > 0 ? a / b : 0;
}

std::string first_line(const std::string &path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

double share_of_v2(const std::string &directory) {
  std::istringstream line(first_line(directory + "/cpu.max"));
  std::string quota;
  std::string period;
  line >> quota >> period;
  return share(quota, period);
}

double share_of_v1(const std::string &directory) {
  return share(first_line(directory + "/cpu.cfs_quota_us"),
               first_line(directory + "/cpu.cfs_period_us"));
}

/// The smallest share from the group up to the root; 0 where none is limited.
double strictest(const std::string &root, std::string group,
                 double (*share_of)(const std::string &)) {
  double least = 0;
  for (;;) {
    const double found = share_of(root + group);
    if (found > 0 && (least == 0 || found < least)) {
      least = found;
    }
    const std::size_t slash = group.find_last_of('/');
    if (slash == std::string::npos) {
      return least;
    }
    group.resize(slash);
  }
}

} // namespace

int cgroup_cpus(const std::string &self, const std::string &mount) {
  std::ifstream file(self);
  double least = 0;
  const auto consider = [&least](double found) {
    if (found > 0 && (least == 0 || found < least)) {
      least = found;
    }
  };
  // A line is "number:controllers:group"; v2's has no controllers.
  for (std::string line; std::getline(file, line);) {
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) {
      continue;
    }
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string group = line.substr(second + 1);
    if (controllers.empty()) {
      consider(strictest(mount, group, share_of_v2));
    } else if (("," + controllers + ",").find(",cpu,") != std::string::npos) {
      for (const char *name : {"/cpu", "/cpu,cpuacct"}) {
        consider(strictest(mount + name, group, share_of_v1));
      }
    }
  }
  constexpr double kMany = 1e6;
  return static_cast<int>(std::ceil(std::min(least, kMany)));
}

int usable_cpus() {
  int cpus = 0;
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    cpus = CPU_COUNT(&set);
  }
#endif
  if (cpus <= 0) {
    cpus = static_cast<int>(std::thread::hardware_concurrency());
  }
#if defined(__linux__)
  const int quota = cgroup_cpus("/proc/self/cgroup", "/sys/fs/cgroup");
  if (quota > 0) {
    cpus = std::min(cpus, quota);
  }
#endif
  return std::max(cpus, 1);
}

} // namespace mixedkv
