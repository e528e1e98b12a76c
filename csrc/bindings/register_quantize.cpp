// Formats, and the conversion of whole arrays from one to another.
#include "bindings/arrays.h"
#include "bindings/threads.h"

#include "mixedkv/convert.h"
#include "mixedkv/runtime.h"

#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

namespace mixedkv::bindings {
namespace {

/// [(name, values of a block, bytes of a block, ggml's number or -1)].
std::vector<std::tuple<std::string, int, int, int>> formats() {
  std::vector<std::tuple<std::string, int, int, int>> all;
  for (const FormatInfo &info : kFormats) {
    all.emplace_back(info.name, info.block_values, info.block_bytes, info.ggml_type);
  }
  return all;
}

/// x [rows, row of x_format] into out [rows, row of out_format]. finite: x, which is float32 or
/// float16 then, is refused where one of its values is not finite, before anything is written.
void convert(const py::array &x, const std::string &x_format, const py::array &out,
             const std::string &out_format, bool finite, int threads) {
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
  if (finite && from.format != Format::f32 && from.format != Format::f16) {
    throw std::invalid_argument("x must be float32 or float16 to be checked for finite values");
  }
  const auto n = static_cast<std::size_t>(from.width);
  const int num_threads = threads > 0 ? threads : get_num_threads();
  const ConstRowsView rows{from.data, from.format, from.strides[0]};
  bool good = true;
  {
    GilRelease release;
    good = !finite || all_finite(rows, from.shape[0], n, num_threads);
    if (good) {
      convert_rows(rows, {to.data, to.format, to.strides[0]}, from.shape[0], n, num_threads);
    }
  }
  if (!good) {
    throw std::invalid_argument(
        "x must be finite, got a NaN or an infinity among its values; nothing was written");
  }
}

} // namespace

void register_quantize(py::module_ &m) {
  m.def("formats", &formats);
  m.def("convert", &convert, py::arg("x"), py::arg("x_format"), py::arg("out"),
        py::arg("out_format"), py::arg("finite"), py::arg("threads"));
}

} // namespace mixedkv::bindings
