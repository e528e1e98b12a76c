#include "rows/hadamard.h"

#include "kernels/dispatch.h"

namespace mixedkv {

void Hadamard::apply(float *row, std::size_t n) const noexcept {
  active_kernels().hadamard(row, n, hadamard_block(n));
}

} // namespace mixedkv
