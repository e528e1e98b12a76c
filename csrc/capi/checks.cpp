#include "capi/checks.h"

#include <cstdio>

namespace mixedkv::capi {
namespace {

/// More is no structure of ours, but a size that was never set.
constexpr std::size_t kMostStruct = 4096;

long long wide(std::int64_t value) { return static_cast<long long>(value); }

bool is_aligned(const void *pointer, std::size_t alignment) {
  return reinterpret_cast<std::uintptr_t>(pointer) % alignment == 0;
}

} // namespace

Name::Text Name::text() const {
  char place[80] = "";
  if (segment_ >= 0) {
    std::snprintf(place, sizeof place, "problems[%lld].segments[%lld]%s", wide(problem_),
                  wide(segment_), *text_ != '\0' ? "." : "");
  } else if (problem_ >= 0) {
    std::snprintf(place, sizeof place, "problems[%lld]%s", wide(problem_),
                  *text_ != '\0' ? "." : "");
  }
  Text text;
  std::snprintf(text.data, sizeof text.data, "%s%s%s%s", place, text_,
                member_ != nullptr ? "." : "", member_ != nullptr ? member_ : "");
  return text;
}

void check_range(const Name &name, std::int64_t value, std::int64_t least, std::int64_t most) {
  if (value < least || value > most) {
    refuse(MIXEDKV_INVALID_ARGUMENT, "%s must be from %lld to %lld, got %lld", name.text().data,
           wide(least), wide(most), wide(value));
  }
}

void check_pointer(const Name &name, const void *pointer, std::size_t alignment) {
  if (pointer == nullptr) {
    refuse(MIXEDKV_INVALID_ARGUMENT, "%s must not be null", name.text().data);
  }
  check_optional(name, pointer, alignment);
}

void check_optional(const Name &name, const void *pointer, std::size_t alignment) {
  if (!is_aligned(pointer, alignment)) {
    refuse(MIXEDKV_INVALID_ARGUMENT, "%s must be aligned to %zu bytes, got %p", name.text().data,
           alignment, pointer);
  }
}

void check_multiple(const Name &name, std::int64_t value, std::int64_t of) {
  if (value % of != 0) {
    refuse(MIXEDKV_INVALID_ARGUMENT, "%s must be a multiple of %lld, got %lld", name.text().data,
           wide(of), wide(value));
  }
}

void check_zero(const Name &name, std::int64_t value) {
  if (value != 0) {
    refuse(MIXEDKV_UNSUPPORTED, "%s must be zero for this version, got %lld", name.text().data,
           wide(value));
  }
}

void check_flags(const Name &name, std::uint32_t flags, std::uint32_t known) {
  if ((flags & ~known) != 0) {
    refuse(MIXEDKV_UNSUPPORTED, "%s has bits that this version does not know: 0x%x",
           name.text().data, static_cast<unsigned>(flags & ~known));
  }
}

void check_apart(const Name &name, std::int64_t stride, std::int64_t width) {
  if (stride < width && -width < stride) {
    refuse(MIXEDKV_INVALID_ARGUMENT, "%s must keep rows of %lld apart, got %lld", name.text().data,
           wide(width), wide(stride));
  }
}

Format check_format(const Name &name, mixedkv_format format) {
  if (format < 0 || format >= kNumFormats) {
    refuse(MIXEDKV_INVALID_ARGUMENT, "%s must be a format's number, from 0 to %d, got %d",
           name.text().data, kNumFormats - 1, static_cast<int>(format));
  }
  return static_cast<Format>(format);
}

void check_width(const Name &name, std::int64_t n, Format format) {
  const FormatInfo &info = format_info(format);
  if (!info.holds(n)) {
    refuse(MIXEDKV_INVALID_ARGUMENT, "%s must be a multiple of %d for %s, got %lld",
           name.text().data, info.block_values, info.name, wide(n));
  }
}

std::size_t row_alignment(Format format) {
  const FormatInfo &info = format_info(format);
  return info.plain() ? static_cast<std::size_t>(info.block_bytes) : alignof(f16_t);
}

std::size_t check_size(const Name &name, const void *structure, std::size_t least) {
  check_pointer(name, structure, alignof(std::size_t));
  std::size_t size = 0;
  std::memcpy(&size, structure, sizeof size);
  if (size < least || size > kMostStruct) {
    refuse(MIXEDKV_INVALID_ARGUMENT, "%s must be the structure's size, at least %zu, got %zu",
           name.of("struct_size").text().data, least, size);
  }
  return size;
}

void check_rest(const Name &name, const void *structure, std::size_t size, std::size_t known) {
  const char *bytes = static_cast<const char *>(structure);
  for (std::size_t i = known; i < size; ++i) {
    if (bytes[i] != 0) {
      refuse(MIXEDKV_UNSUPPORTED,
             "%s has %zu bytes, which are not all zero beyond the %zu that this version knows",
             name.text().data, size, known);
    }
  }
}

} // namespace mixedkv::capi
