// How fast this machine reads memory: the roof over every decode step.
#pragma once

#include <cstddef>

namespace mixedkv::bench {

/// Bytes a second that so many threads read now, again and again through one buffer of (about) this
/// size, in the way that was the fastest of three when tried for it before.
double read_speed(std::size_t bytes, int threads);

} // namespace mixedkv::bench
