// What several C functions check. All of it refuses with the argument's name and its value.
#pragma once

#include "capi/status.h"
#include "mixedkv/formats.h"

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace mixedkv::capi {

/// Bounds that keep every product of sizes within 64 bits; no model comes near.
constexpr std::int64_t kMostHeads = 1 << 16;
constexpr std::int64_t kMostDim = 1 << 16;
constexpr std::int64_t kMostLen = INT32_MAX;
constexpr std::int64_t kMostThreads = 1024;
constexpr std::int64_t kMostWindow = std::int64_t{1} << 40; ///< as in Python

/// An argument as messages name it: "params", or "problems[2].segments[0].k" made from its parts
/// when it is wrong and no sooner.
class Name {
public:
  Name(const char *text) : text_(text) {}
  /// problems[problem].text
  Name(std::int64_t problem, const char *text) : text_(text), problem_(problem) {}
  /// problems[problem].segments[segment].text
  Name(std::int64_t problem, std::int64_t segment, const char *text)
      : text_(text), problem_(problem), segment_(segment) {}
  /// member: without a dot where this is a function's argument itself.
  Name of(const char *member) const {
    Name name = *this;
    name.member_ = member;
    return name;
  }
  struct Text {
    char data[128];
  };
  Text text() const;

private:
  const char *text_;
  const char *member_ = nullptr;
  std::int64_t problem_ = -1;
  std::int64_t segment_ = -1;
};

void check_range(const Name &name, std::int64_t value, std::int64_t least, std::int64_t most);
/// Not null, and a multiple of alignment.
void check_pointer(const Name &name, const void *pointer, std::size_t alignment);
/// Null, or a multiple of alignment.
void check_optional(const Name &name, const void *pointer, std::size_t alignment);
void check_multiple(const Name &name, std::int64_t value, std::int64_t of);
void check_zero(const Name &name, std::int64_t value);
/// Known flags only.
void check_flags(const Name &name, std::uint32_t flags, std::uint32_t known);
/// Rows that are written to must not lie over one another: |stride| >= width.
void check_apart(const Name &name, std::int64_t stride, std::int64_t width);
Format check_format(const Name &name, mixedkv_format format);
/// That a row of the format may hold n values, whose number is called name.
void check_width(const Name &name, std::int64_t n, Format format);
/// Rows of the format begin at multiples of it.
std::size_t row_alignment(Format format);

/// The size that a caller's structure says: least (its first version's) or more.
std::size_t check_size(const Name &name, const void *structure, std::size_t least);
/// That bytes of a structure from known on, which this library does not know, are all zero.
void check_rest(const Name &name, const void *structure, std::size_t size, std::size_t known);

/// The caller's structure in the library's size; what the caller does not know is zero.
template <typename T> T read_struct(const Name &name, const T *from, std::size_t least) {
  const std::size_t size = check_size(name, from, least);
  check_rest(name, from, size, sizeof(T));
  T own{};
  std::memcpy(&own, from, size < sizeof(T) ? size : sizeof(T));
  return own;
}

/// The same the other way: fills what the caller's structure has room for.
template <typename T> void write_struct(const Name &name, const T &own, T *to, std::size_t least) {
  const std::size_t size = check_size(name, to, least);
  constexpr std::size_t kAfterSize = sizeof(to->struct_size);
  std::memcpy(reinterpret_cast<char *>(to) + kAfterSize,
              reinterpret_cast<const char *>(&own) + kAfterSize,
              (size < sizeof(T) ? size : sizeof(T)) - kAfterSize);
}

/// Bytes of a structure up to the last member of its first version.
#define MIXEDKV_FIRST_SIZE(type, last) (offsetof(type, last) + sizeof(type::last))

/// Element i of an array of structures of the caller's size.
template <typename T> const T *element(const T *array, std::size_t size, std::int64_t i) {
  return reinterpret_cast<const T *>(reinterpret_cast<const char *>(array) +
                                     size * static_cast<std::size_t>(i));
}

} // namespace mixedkv::capi
