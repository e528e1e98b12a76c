// numpy arrays as the core sees them: pointers, types, sizes, strides. The checks that keep a wrong
// call from reading or writing where it must not are all here; the façade's own come before them.
#pragma once

#include "mixedkv/attention.h"
#include "mixedkv/formats.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

namespace mixedkv::bindings {

namespace py = pybind11;

enum class DType : std::uint8_t { f32, f16, u8, boolean, i64 };

/// A checked array of at most four axes; strides in bytes.
struct ArrayView {
  char *data = nullptr;
  DType dtype = DType::f32;
  int ndim = 0;
  std::array<std::int64_t, 4> shape{};
  std::array<std::ptrdiff_t, 4> strides{};

  template <typename T> T *as() const { return reinterpret_cast<T *>(data); }
  std::string shape_text() const {
    std::string text = "(";
    for (int i = 0; i < ndim; ++i) {
      text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
    }
    return text + ")";
  }
};

inline const char *dtype_name(DType dtype) {
  switch (dtype) {
  case DType::f32:
    return "float32";
  case DType::f16:
    return "float16";
  case DType::u8:
    return "uint8";
  case DType::boolean:
    return "bool";
  case DType::i64:
    return "int64";
  }
  return "?";
}

enum class Access : std::uint8_t { read, write };

/// Checks ndim, dtype, alignment, that the last axis is contiguous, and that a target is writable.
inline ArrayView view_array(const py::array &array, const char *name, int ndim,
                            std::initializer_list<DType> dtypes, Access access = Access::read,
                            bool contiguous_last = true) {
  ArrayView view;
  if (array.ndim() != ndim || ndim > 4) {
    throw std::invalid_argument(std::string(name) + " must have " + std::to_string(ndim) +
                                " axes, got " + std::to_string(array.ndim()));
  }
  const char kind = array.dtype().kind();
  const auto item_size = static_cast<std::ptrdiff_t>(array.itemsize());
  bool known = false;
  const bool native = array.dtype().byteorder() == '=' || array.dtype().byteorder() == '|';
  for (const DType dtype : dtypes) {
    const bool match = (dtype == DType::f32 && kind == 'f' && item_size == 4) ||
                       (dtype == DType::f16 && kind == 'f' && item_size == 2) ||
                       (dtype == DType::u8 && kind == 'u' && item_size == 1) ||
                       (dtype == DType::boolean && kind == 'b' && item_size == 1) ||
                       (dtype == DType::i64 && kind == 'i' && item_size == 8);
    if (match && native) {
      view.dtype = dtype;
      known = true;
    }
  }
  if (!known) {
    std::string wanted;
    for (const DType dtype : dtypes) {
      wanted += (wanted.empty() ? "" : " or ") + std::string(dtype_name(dtype));
    }
    throw py::type_error(std::string(name) + " must be " + wanted + ", got " +
                         py::str(static_cast<py::object>(array.dtype())).cast<std::string>());
  }
  if (access == Access::write && !array.writeable()) {
    throw std::invalid_argument(std::string(name) + " must be writable");
  }
  view.ndim = ndim;
  view.data = const_cast<char *>(static_cast<const char *>(array.data()));
  bool aligned = reinterpret_cast<std::uintptr_t>(view.data) % item_size == 0;
  for (int i = 0; i < ndim; ++i) {
    view.shape[i] = array.shape(i);
    view.strides[i] = array.strides(i);
    aligned = aligned && view.strides[i] % item_size == 0;
  }
  if (!aligned && array.size() > 0) {
    throw std::invalid_argument(std::string(name) + " must be aligned");
  }
  // Strides of an array without elements mean nothing.
  if (contiguous_last && ndim > 0 && array.size() > 0 && view.shape[ndim - 1] > 1 &&
      view.strides[ndim - 1] != item_size) {
    throw std::invalid_argument(std::string(name) + " must be contiguous in its last axis");
  }
  return view;
}

/// The same, and contiguous as a whole.
inline ArrayView view_contiguous(const py::array &array, const char *name, int ndim,
                                 std::initializer_list<DType> dtypes,
                                 Access access = Access::read) {
  const ArrayView view = view_array(array, name, ndim, dtypes, access);
  if ((array.flags() & py::array::c_style) == 0) {
    throw std::invalid_argument(std::string(name) + " must be contiguous");
  }
  return view;
}

inline void check_shape(const ArrayView &view, const char *name,
                        std::initializer_list<std::int64_t> shape) {
  int i = 0;
  bool match = static_cast<int>(shape.size()) == view.ndim;
  std::string wanted;
  for (const std::int64_t n : shape) {
    match = match && view.shape[i++] == n;
    wanted += (wanted.empty() ? "(" : ", ") + std::to_string(n);
  }
  if (!match) {
    throw std::invalid_argument(std::string(name) + " must have shape " + wanted +
                                (view.ndim == 1 ? ",)" : ")") + ", got " + view.shape_text());
  }
}

/// The format of a type that numpy has.
inline Format plain_format(DType dtype) { return dtype == DType::f16 ? Format::f16 : Format::f32; }

inline Format parse_format(const std::string &text, const char *name) {
  std::string known;
  for (int i = 0; i < kNumFormats; ++i) {
    const Format format = static_cast<Format>(i);
    if (text == format_name(format)) {
      return format;
    }
    known += i == 0 ? "'" : i + 1 < kNumFormats ? "', '" : "' or '";
    known += format_name(format);
  }
  throw std::invalid_argument(std::string(name) + " must be " + known + "', got '" + text + "'");
}

/// An array of rows, its last axis the row: float32 and float16 as they are, rows of any other
/// format as their bytes.
struct RowsArray : ArrayView {
  Format format = Format::f32;
  std::int64_t width = 0; ///< values in a row
};

inline RowsArray view_rows(const py::array &array, const char *name, int ndim, Format format,
                           Access access = Access::read) {
  const DType dtype = format == Format::f32   ? DType::f32
                      : format == Format::f16 ? DType::f16
                                              : DType::u8;
  RowsArray rows;
  static_cast<ArrayView &>(rows) = view_array(array, name, ndim, {dtype}, access);
  rows.format = format;
  rows.width = rows.shape[ndim - 1];
  if (dtype != DType::u8) {
    return rows;
  }
  const FormatInfo &info = format_info(format);
  if (rows.width % info.block_bytes != 0) {
    throw std::invalid_argument("the last axis of " + std::string(info.name) + " rows in " + name +
                                " must be a multiple of " + std::to_string(info.block_bytes) +
                                " bytes, got " + rows.shape_text());
  }
  rows.width = rows.width / info.block_bytes * info.block_values;
  if (info.plain() && array.size() > 0) { // numbers, which are read as such
    bool aligned = reinterpret_cast<std::uintptr_t>(rows.data) % info.block_bytes == 0;
    for (int i = 0; i + 1 < ndim; ++i) {
      aligned = aligned && rows.strides[i] % info.block_bytes == 0;
    }
    if (!aligned) {
      throw std::invalid_argument(std::string(name) + " must be aligned");
    }
  }
  return rows;
}

/// A number that fits an int.
inline int narrow(std::int64_t value, const char *name) {
  if (value < std::numeric_limits<int>::min() || value > std::numeric_limits<int>::max()) {
    throw std::invalid_argument(std::string(name) + " is out of range: " + std::to_string(value));
  }
  return static_cast<int>(value);
}

using OptionalArray = std::optional<py::array>;

/// "f32", "bf16" or "auto".
inline ComputeType parse_compute_type(const std::string &text) {
  if (text == "auto") {
    return ComputeType::automatic;
  }
  if (text != "f32" && text != "bf16") {
    throw std::invalid_argument("compute_type must be 'f32', 'bf16' or 'auto', got '" + text + "'");
  }
  return text == "f32" ? ComputeType::f32 : ComputeType::bf16;
}

/// The bytes from an array's first element to its last.
struct Extent {
  const char *begin = nullptr;
  const char *end = nullptr;
};

inline Extent extent_of(const py::array &array) {
  if (array.size() == 0) {
    return {};
  }
  const char *begin = static_cast<const char *>(array.data());
  const char *end = begin + array.itemsize();
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    const py::ssize_t reach = array.strides(i) * (array.shape(i) - 1);
    (reach < 0 ? begin : end) += reach;
  }
  return {begin, end};
}

/// Something that a call reads, or writes, and its name; null where the caller gave none.
struct NamedArray {
  const char *name;
  const py::array *array;
  NamedArray(const char *n, const py::array &a) : name(n), array(&a) {}
  NamedArray(const char *n, const OptionalArray &a) : name(n), array(a ? &*a : nullptr) {}
};

/// Refuses a target that shares memory with a source, which is read while the target is written.
/// Judged by extents, as numpy.may_share_memory does.
inline void check_apart(const NamedArray &target, std::initializer_list<NamedArray> sources) {
  if (target.array == nullptr) {
    return;
  }
  const Extent to = extent_of(*target.array);
  for (const NamedArray &source : sources) {
    const Extent from = source.array != nullptr ? extent_of(*source.array) : Extent{};
    if (to.begin < from.end && from.begin < to.end) {
      throw std::invalid_argument(std::string(target.name) + " must not share memory with " +
                                  source.name);
    }
  }
}

/// [num_qo_heads] floats, or null.
inline const float *per_head(const OptionalArray &array, const char *name,
                             std::int64_t num_qo_heads) {
  if (!array) {
    return nullptr;
  }
  const ArrayView view = view_contiguous(*array, name, 1, {DType::f32});
  check_shape(view, name, {num_qo_heads});
  return view.as<const float>();
}

void register_machine(py::module_ &m);
void register_quantize(py::module_ &m);
void register_attention(py::module_ &m);
void register_paged(py::module_ &m);
void register_cache(py::module_ &m);

} // namespace mixedkv::bindings
