#include "rows/changed_rows.h"

#include "mixedkv/convert.h"
#include "rows/parallel_rows.h"

namespace mixedkv {

RowsView ChangedRows::apply(const RowTransform *transform, const RowsView &rows, int num_heads,
                            std::int64_t num_tokens, int width) {
  if (transform == nullptr) {
    return rows;
  }
  const std::int64_t num_values = num_heads * num_tokens * width;
  if (static_cast<std::int64_t>(values_.size()) < num_values) {
    values_.resize(static_cast<std::size_t>(num_values));
  }
  const std::size_t n = static_cast<std::size_t>(width);
  parallel_rows(num_heads * num_tokens, num_values, [&](std::int64_t unit) {
    const char *from = static_cast<const char *>(rows.data) + unit / num_tokens * rows.head_stride +
                       unit % num_tokens * rows.row_stride;
    float *to = values_.data() + unit * width;
    convert_row(rows.type, from, Format::f32, to, n);
    transform->apply(to, n);
  });
  constexpr auto f32_size = static_cast<std::ptrdiff_t>(sizeof(float));
  return {values_.data(), Format::f32, num_tokens * width * f32_size, width * f32_size};
}

} // namespace mixedkv
