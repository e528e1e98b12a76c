// How many CPUs this process may keep busy.
#pragma once

#include <string>

namespace mixedkv {

/// CPUs of the affinity mask, or fewer where a cgroup's quota allows less; at least 1.
int usable_cpus();

/// CPUs that the strictest quota above a process amounts to, rounded up; 0 where there is none.
/// self: a file like /proc/self/cgroup, which names the process's groups; mount: where groups are
/// directories, /sys/fs/cgroup (v2), with a directory `cpu` or `cpu,cpuacct` in it (v1). A group
/// that is not there belongs to another namespace: the nearest one above it counts.
int cgroup_cpus(const std::string &self, const std::string &mount);

} // namespace mixedkv
