// Q4_0 conversion of whole arrays.
#include "bindings/arrays.h"
#include "bindings/threads.h"

#include "mixedkv/convert.h"
#include "mixedkv/runtime.h"

namespace mixedkv::bindings {
namespace {

int threads_or_default(int threads) { return threads > 0 ? threads : get_num_threads(); }

void quantize(const py::array &x, const py::array &out, int threads) {
  const ArrayView from = view_array(x, "x", 2, {DType::f32, DType::f16});
  const ArrayView to = view_array(out, "out", 2, {DType::u8}, Access::write);
  const std::int64_t n = from.shape[1];
  if (n % QK4_0 != 0) {
    throw std::invalid_argument("the last axis of x must be a multiple of 32, got shape " +
                                from.shape_text());
  }
  check_shape(to, "out", {from.shape[0], static_cast<std::int64_t>(row_bytes(Format::q4_0, n))});
  const int num_threads = threads_or_default(threads);
  const ConstRowsView rows{from.data, kv_type(from.dtype), from.strides[0]};
  bool finite = false;
  {
    GilRelease release;
    finite = all_finite(rows, from.shape[0], n, num_threads);
    if (finite) {
      convert_rows(rows, {to.data, Format::q4_0, to.strides[0]}, from.shape[0], n, num_threads);
    }
  }
  if (!finite) {
    throw std::invalid_argument(
        "x must be finite, got a NaN or an infinity among its values; nothing was written");
  }
}

void dequantize(const py::array &x, const py::array &out, int threads) {
  const ArrayView from = view_array(x, "x", 2, {DType::u8});
  const ArrayView to = view_array(out, "out", 2, {DType::f32, DType::f16}, Access::write);
  const std::int64_t n = row_width(from, "x");
  check_shape(to, "out", {from.shape[0], n});
  const int num_threads = threads_or_default(threads);
  GilRelease release;
  convert_rows({from.data, Format::q4_0, from.strides[0]},
               {to.data, kv_type(to.dtype), to.strides[0]}, from.shape[0], n, num_threads);
}

} // namespace

void register_quantize(py::module_ &m) {
  m.def("quantize_q4_0", &quantize, py::arg("x"), py::arg("out"), py::arg("threads"));
  m.def("dequantize_q4_0", &dequantize, py::arg("x"), py::arg("out"), py::arg("threads"));
}

} // namespace mixedkv::bindings
