// How a C function ends: a body that may throw, and a status and a text for its caller.
#pragma once

#include "mixedkv/c.h"

namespace mixedkv::capi {

/// What refuse throws; its text is recorded already.
struct Refusal {
  mixedkv_status status;
};

/// Records the text, as printf makes it, for mixedkv_last_error, and throws a Refusal.
#if defined(__GNUC__)
[[noreturn]] __attribute__((format(printf, 2, 3)))
#else
[[noreturn]]
#endif
void refuse(mixedkv_status status, const char *format, ...);

/// The status of the exception that is being handled; records its text.
mixedkv_status handled_exception() noexcept;

template <typename F> mixedkv_status guarded(F &&body) noexcept {
  try {
    body();
    return MIXEDKV_OK;
  } catch (...) {
    return handled_exception();
  }
}

} // namespace mixedkv::capi
