// Reporting: a test is a function that returns whether it passed.
#pragma once

#include <cstdio>
#include <string>

namespace {

int num_passed = 0;
int num_failed = 0;

void report(const std::string &name, bool ok) {
  std::printf("%s %s\n", ok ? "ok  " : "FAIL", name.c_str());
  std::fflush(stdout);
  ++(ok ? num_passed : num_failed);
}

#define EXPECT(condition)                                                                          \
  do {                                                                                             \
    if (!(condition)) {                                                                            \
      std::printf("  %s:%d: %s\n", __FILE__, __LINE__, #condition);                                \
      return false;                                                                                \
    }                                                                                              \
  } while (false)

} // namespace
