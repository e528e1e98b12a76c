// Memory that is kept from call to call.
#pragma once

#include <cstddef>
#include <new>

namespace mixedkv {

/// A buffer that grows and never shrinks, so that a steady state allocates nothing.
template <typename T> class Buffer {
public:
  Buffer() = default;
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  ~Buffer() { ::operator delete[](data_, std::align_val_t(64)); }
  /// At least size elements, contents undefined.
  T *get(std::size_t size) {
    if (size > capacity_) {
      const std::size_t wanted = size + size / 2;
      void *fresh = ::operator new[](wanted * sizeof(T), std::align_val_t(64));
      ::operator delete[](data_, std::align_val_t(64));
      data_ = static_cast<T *>(fresh);
      capacity_ = wanted;
    }
    return data_;
  }

private:
  T *data_ = nullptr;
  std::size_t capacity_ = 0;
};

} // namespace mixedkv
