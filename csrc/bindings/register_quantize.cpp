// Formats, and the conversion of whole arrays from one to another.
#include "bindings/arrays.h"
#include "bindings/threads.h"

#include "mixedkv/convert.h"
#include "mixedkv/runtime.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace mixedkv::bindings {
namespace {

/// [(name, values of a block, bytes of a block, ggml's number or -1, overflow or 0, fits)].
std::vector<std::tuple<std::string, int, int, int, double, bool>> formats() {
  std::vector<std::tuple<std::string, int, int, int, double, bool>> all;
  for (const FormatInfo &info : kFormats) {
    all.emplace_back(info.name, info.block_values, info.block_bytes, info.ggml_type, info.overflow,
                     info.fits);
  }
  return all;
}

/// x [rows, row of x_format] into out [rows, row of out_format]. check: (row, column, value) of the
/// first value that out's format does not keep is returned, where there is one, and nothing
/// written. fit_scales: out_format's scales by least squared error.
std::optional<std::tuple<std::int64_t, std::int64_t, float>>
convert(const py::array &x, const std::string &x_format, const py::array &out,
        const std::string &out_format, bool check, bool fit_scales, int threads) {
  check_apart({"out", out}, {{"x", x}});
  const RowsArray from = view_rows(x, "x", 2, parse_format(x_format, "x_format"));
  const RowsArray to =
      view_rows(out, "out", 2, parse_format(out_format, "out_format"), Access::write);
  if (to.shape[0] != from.shape[0] || to.width != from.width) {
    throw std::invalid_argument("out must have as many rows and values as x, " +
                                std::to_string(from.shape[0]) + " and " +
                                std::to_string(from.width) + ", got " +
                                std::to_string(to.shape[0]) + " and " + std::to_string(to.width));
  }
  if (fit_scales && !format_info(to.format).fits) {
    throw std::invalid_argument("fit_scales must be False for " + out_format +
                                ", whose blocks have no choice of scales, got True");
  }
  const auto n = static_cast<std::size_t>(from.width);
  const int num_threads = threads > 0 ? threads : get_num_threads();
  const ConstRowsView rows{from.data, from.format, from.strides[0]};
  GilRelease release;
  if (check) {
    if (const auto bad = find_unkept(rows, from.shape[0], n, to.format, num_threads)) {
      return std::make_tuple(bad->row, bad->column, bad->value);
    }
  }
  convert_rows(rows, {to.data, to.format, to.strides[0]}, from.shape[0], n, num_threads,
               fit_scales);
  return std::nullopt;
}

} // namespace

void register_quantize(py::module_ &m) {
  m.def("formats", &formats);
  m.def("convert", &convert, py::arg("x"), py::arg("x_format"), py::arg("out"),
        py::arg("out_format"), py::arg("check"), py::arg("fit_scales"), py::arg("threads"));
}

} // namespace mixedkv::bindings
