// Refusals of arguments, all in one form: the name, what it must be, and what it was.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace mixedkv {

template <typename T>
[[noreturn]] void refuse(const std::string &name, const std::string &must, const T &value) {
  std::ostringstream message;
  message << name << " must " << must << ", got " << value;
  throw std::invalid_argument(message.str());
}

template <typename T> void check(bool ok, const char *name, const char *must, const T &value) {
  if (!ok) {
    refuse(name, must, value);
  }
}

/// A sequence id.
inline void check_seq(const char *name, std::int64_t seq, int n_seq_max) {
  if (seq < 0 || seq >= n_seq_max) {
    refuse(name, "be a sequence id below n_seq_max (" + std::to_string(n_seq_max) + ")", seq);
  }
}

} // namespace mixedkv
