// What tests of kernels share: every instruction set in turn, lengths that are awkward for vectors,
// how rows lie in memory, and rows converted by one kernel and by its oracle.
#pragma once

#include "checks.h"
#include "kernels/dispatch.h"

namespace testing {

using namespace mixedkv;

/// Runs run(name, kernels) for every instruction set that this machine has, and names the others.
template <typename F> void on_each_isa(F &&run) {
  for (const IsaInfo &isa : compiled_isas())
    if (isa.available)
      run(std::string(isa.name), kernels_for(isa.name));
    else
      std::printf("SKIP %s: needs %s, which this machine lacks\n", isa.name, isa.requires_);
}

/// 1, 3, 7, N/2, N, N+1, 3N, 8N+2 for the widths of all vectors and of loops unrolled over them.
inline std::vector<std::size_t> lengths() {
  std::vector<std::size_t> all = {1, 3, 7};
  for (std::size_t n : {4, 8, 16, 64})
    for (std::size_t length : {n / 2, n, n + 1, 3 * n, 8 * n + 2})
      all.push_back(length);
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  return all;
}

enum class Order { dense, strided, indexed };
inline const Order kOrders[] = {Order::dense, Order::strided, Order::indexed};

template <typename Y, typename X, typename F>
void compare_rows(const Input<X> &x, std::size_t num_out, std::size_t misalignment, std::size_t n,
                  F *got_fn, F *expected_fn) {
  Output<Y> got(num_out, misalignment), expected(num_out, misalignment);
  got_fn(x.data(), got.data(), n);
  expected_fn(x.data(), expected.data(), n);
  EXPECT(got.guards_intact() && expected.guards_intact(), "guards, n %zu", n);
  for (std::size_t i = 0; i < num_out; ++i)
    if (std::memcmp(&got[i], &expected[i], sizeof(Y)) != 0) {
      EXPECT(false, "n %zu: element %zu differs", n, i);
      break;
    }
}

} // namespace testing
