// MixedCache: random operations against a brute-force model.
#include "cache_driver.h"
#include "runtime/parallel.h"

#include <cstdlib>

/// The seed of the random operations may be given, for a longer search than fits every day.
int main(int argc, char **argv) {
  set_num_threads(2);
  random_operations(argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 42u);
  return testing::summary();
}
