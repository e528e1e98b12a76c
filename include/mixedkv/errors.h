// The exceptions of the cache that Python users see under names of their own.
#pragma once

#include "mixedkv/export.h"

#include <stdexcept>

namespace mixedkv {

/// There is no room for what was asked; the message says what was asked and what is free.
struct MIXEDKV_API CacheFull : std::runtime_error {
  using std::runtime_error::runtime_error;
};

} // namespace mixedkv
