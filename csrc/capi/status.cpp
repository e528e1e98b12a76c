#include "capi/status.h"

#include <cstdarg>
#include <cstdio>
#include <exception>
#include <new>
#include <stdexcept>

namespace mixedkv::capi {
namespace {

/// Of a fixed size: to tell that there is no memory must not take any. A longer text is cut.
thread_local char last_error[512] = "";

void record(const char *text) noexcept { std::snprintf(last_error, sizeof last_error, "%s", text); }

} // namespace

void refuse(mixedkv_status status, const char *format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  throw Refusal{status};
}

mixedkv_status handled_exception() noexcept {
  try {
    throw;
  } catch (const Refusal &refusal) {
    return refusal.status;
  } catch (const std::invalid_argument &error) {
    record(error.what());
    return MIXEDKV_INVALID_ARGUMENT;
  } catch (const std::bad_alloc &) {
    record("there is not enough memory");
    return MIXEDKV_OUT_OF_MEMORY;
  } catch (const std::length_error &) { // a container's way to say the same
    record("there is not enough memory");
    return MIXEDKV_OUT_OF_MEMORY;
  } catch (const std::exception &error) {
    record(error.what());
    return MIXEDKV_INTERNAL;
  } catch (...) {
    record("unknown error");
    return MIXEDKV_INTERNAL;
  }
}

} // namespace mixedkv::capi

const char *mixedkv_status_text(mixedkv_status status) {
  switch (status) {
  case MIXEDKV_OK:
    return "ok";
  case MIXEDKV_INVALID_ARGUMENT:
    return "invalid argument";
  case MIXEDKV_OUT_OF_MEMORY:
    return "out of memory";
  case MIXEDKV_UNSUPPORTED:
    return "not supported by this version";
  case MIXEDKV_INTERNAL:
    return "internal error";
  default:
    return "unknown status";
  }
}

const char *mixedkv_last_error(void) { return mixedkv::capi::last_error; }
const char *mixedkv_version(void) { return MIXEDKV_VERSION_STRING; }
int32_t mixedkv_abi_version(void) { return MIXEDKV_ABI_VERSION; }
