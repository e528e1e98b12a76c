// What all tests report with: named checks, counted. Inside a check, EXPECT notes a failure and
// goes on; in a function that returns whether it passed, REQUIRE notes it and returns false.
#pragma once

#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <string>

namespace testing {

inline int num_passed = 0;
inline int num_failed = 0;
inline int failures_in_check = 0;
inline const char *name_filter = "";

inline void fail(const char *file, int line, const char *format, ...) {
  if (++failures_in_check > 5)
    return;
  std::printf("    %s:%d: ", file, line);
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
}

/// With a message, as for printf.
#define EXPECT(condition, ...)                                                                     \
  do {                                                                                             \
    if (!(condition))                                                                              \
      testing::fail(__FILE__, __LINE__, __VA_ARGS__);                                              \
  } while (0)

template <typename F> void check(const std::string &name, F &&body) {
  if (name.find(name_filter) == std::string::npos)
    return;
  failures_in_check = 0;
  const auto begin = std::chrono::steady_clock::now();
  body();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  if (failures_in_check == 0)
    ++num_passed;
  else
    ++num_failed;
  std::printf("%s %s", failures_in_check == 0 ? "ok  " : "FAIL", name.c_str());
  if (seconds.count() >= 1) // where the time of a long run goes
    std::printf(" (%.1f s)", seconds.count());
  std::printf("\n");
  std::fflush(stdout);
}

#define REQUIRE(condition)                                                                         \
  do {                                                                                             \
    if (!(condition)) {                                                                            \
      std::printf("  %s:%d: %s\n", __FILE__, __LINE__, #condition);                                \
      return false;                                                                                \
    }                                                                                              \
  } while (false)

/// The outcome of a check that returned it.
inline void report(const std::string &name, bool ok) {
  std::printf("%s %s\n", ok ? "ok  " : "FAIL", name.c_str());
  std::fflush(stdout);
  ++(ok ? num_passed : num_failed);
}

/// Prints how many checks passed; what main returns.
inline int summary() {
  std::printf("%d passed, %d failed\n", num_passed, num_failed);
  return num_failed == 0 ? 0 : 1;
}

} // namespace testing
