#include "capi/views.h"

namespace mixedkv::capi {
namespace {

/// Positions are 32 bits.
void check_positions(const Name &pos_start_name, std::int64_t pos_start, std::int64_t len) {
  check_range(pos_start_name, pos_start, INT32_MIN, INT32_MAX - len);
}

/// Row numbers from 0, strictly ascending where the order counts.
void check_index(const Name &name, const std::int32_t *index, std::int64_t len, bool ascending) {
  check_optional(name, index, alignof(std::int32_t));
  if (index == nullptr) {
    return;
  }
  std::int64_t last = -1;
  for (std::int64_t i = 0; i < len; ++i) {
    if (ascending ? index[i] <= last : index[i] < 0) {
      refuse(MIXEDKV_INVALID_ARGUMENT, "%s must %s from 0, got %d at %lld", name.text().data,
             ascending ? "ascend strictly" : "count", static_cast<int>(index[i]),
             static_cast<long long>(i));
    }
    last = index[i];
  }
}

} // namespace

void check_same_size(const Name &name, std::size_t size, std::size_t first) {
  if (size != first) {
    refuse(MIXEDKV_INVALID_ARGUMENT, "%s must be %zu as in the array's first, got %zu",
           name.of("struct_size").text().data, first, size);
  }
}

QueryView read_queries(std::int64_t problem, const mixedkv_queries *from) {
  const auto name = [&](const char *text) { return Name(problem, text); };
  const mixedkv_queries q =
      read_struct(name("q"), from, MIXEDKV_FIRST_SIZE(mixedkv_queries, reserved));
  QueryView view;
  view.type = check_format(name("q.format"), q.format);
  if (view.type != Format::f32 && view.type != Format::f16) {
    refuse(MIXEDKV_INVALID_ARGUMENT, "%s must be MIXEDKV_F32 or MIXEDKV_F16, got %d (%s)",
           name("q.format").text().data, static_cast<int>(q.format), format_name(view.type));
  }
  check_range(name("q.len"), q.len, 0, kMostLen);
  const std::size_t alignment = row_alignment(view.type);
  if (q.len > 0) {
    check_pointer(name("q.data"), q.data, alignment);
  }
  check_multiple(name("q.head_stride"), q.head_stride, static_cast<std::int64_t>(alignment));
  check_multiple(name("q.row_stride"), q.row_stride, static_cast<std::int64_t>(alignment));
  check_index(name("q.index"), q.index, q.len, false);
  check_optional(name("q.pos"), q.pos, alignof(std::int32_t));
  check_positions(name("q.pos_start"), q.pos_start, q.len);
  check_zero(name("q.reserved"), q.reserved);
  view.data = q.data;
  view.head_stride = q.head_stride;
  view.row_stride = q.row_stride;
  view.index = q.index;
  view.pos = q.pos;
  view.pos_start = q.pos_start;
  view.len = q.len;
  return view;
}

KeySegment read_segment(std::int64_t problem, std::int64_t number, const mixedkv_segment *segments,
                        const AttentionParams &params) {
  const auto name = [&](const char *text) { return Name(problem, number, text); };
  constexpr std::size_t kLeast = MIXEDKV_FIRST_SIZE(mixedkv_segment, v_page_stride);
  const std::size_t size = check_size(Name(problem, 0, ""), segments, kLeast);
  const mixedkv_segment *at = element(segments, size, number);
  check_same_size(name(""), check_size(name(""), at, kLeast), size);
  const mixedkv_segment s = read_struct(name(""), at, kLeast);
  KeySegment segment;
  check_zero(name("k_layout"), s.k_layout);
  check_zero(name("v_layout"), s.v_layout);
  segment.k_format = check_format(name("k_format"), s.k_format);
  segment.v_format = check_format(name("v_format"), s.v_format);
  check_width("params.head_dim", params.head_dim, segment.k_format);
  check_width("params.head_dim_v", params.head_dim_v, segment.v_format);
  check_range(name("len"), s.len, 0, kMostLen);
  const std::size_t k_alignment = row_alignment(segment.k_format);
  const std::size_t v_alignment = row_alignment(segment.v_format);
  if (s.len > 0) {
    check_pointer(name("k"), s.k, k_alignment);
    check_pointer(name("v"), s.v, v_alignment);
  }
  const auto k_multiple = static_cast<std::int64_t>(k_alignment);
  const auto v_multiple = static_cast<std::int64_t>(v_alignment);
  check_multiple(name("k_head_stride"), s.k_head_stride, k_multiple);
  check_multiple(name("k_row_stride"), s.k_row_stride, k_multiple);
  check_multiple(name("v_head_stride"), s.v_head_stride, v_multiple);
  check_multiple(name("v_row_stride"), s.v_row_stride, v_multiple);
  check_index(name("index"), s.index, s.len, true);
  check_optional(name("pos"), s.pos, alignof(std::int32_t));
  check_positions(name("pos_start"), s.pos_start, s.len);
  if (s.pages != nullptr) {
    if (s.index != nullptr) {
      refuse(MIXEDKV_INVALID_ARGUMENT, "%s must be null where there are pages",
             name("index").text().data);
    }
    check_range(name("page_size"), s.page_size, 1, kMostLen);
    check_index(name("pages"), s.pages, (s.len + s.page_size - 1) / s.page_size, false);
    check_multiple(name("k_page_stride"), s.k_page_stride, k_multiple);
    check_multiple(name("v_page_stride"), s.v_page_stride, v_multiple);
    segment.pages = s.pages;
    segment.page_size = s.page_size;
    segment.k_page_stride = s.k_page_stride;
    segment.v_page_stride = s.v_page_stride;
  }
  segment.k = s.k;
  segment.v = s.v;
  segment.k_head_stride = s.k_head_stride;
  segment.k_row_stride = s.k_row_stride;
  segment.v_head_stride = s.v_head_stride;
  segment.v_row_stride = s.v_row_stride;
  segment.index = s.index;
  segment.pos = s.pos;
  segment.pos_start = s.pos_start;
  segment.len = s.len;
  return segment;
}

MaskView read_mask(std::int64_t problem, const mixedkv_mask *from, bool has_entries) {
  const auto name = [&](const char *text) { return Name(problem, text); };
  const mixedkv_mask m =
      read_struct(name("mask"), from, MIXEDKV_FIRST_SIZE(mixedkv_mask, reserved));
  check_range(name("mask.type"), m.type, MIXEDKV_MASK_F32, MIXEDKV_MASK_BOOL);
  check_zero(name("mask.reserved"), m.reserved);
  const std::int64_t size = m.type == MIXEDKV_MASK_F32 ? 4 : m.type == MIXEDKV_MASK_F16 ? 2 : 1;
  if (has_entries) {
    check_pointer(name("mask.data"), m.data, static_cast<std::size_t>(size));
  }
  check_multiple(name("mask.head_stride"), m.head_stride, size);
  check_multiple(name("mask.query_stride"), m.query_stride, size);
  check_multiple(name("mask.key_stride"), m.key_stride, size);
  MaskView mask;
  mask.type = m.type == MIXEDKV_MASK_F32   ? MaskType::f32
              : m.type == MIXEDKV_MASK_F16 ? MaskType::f16
                                           : MaskType::boolean;
  mask.data = m.data;
  mask.head_stride = m.head_stride;
  mask.query_stride = m.query_stride;
  mask.key_stride = m.key_stride;
  return mask;
}

StateView read_state(const Name &name, const mixedkv_state *from, bool needs_acc) {
  const mixedkv_state s = read_struct(name, from, MIXEDKV_FIRST_SIZE(mixedkv_state, acc));
  check_pointer(name.of("ms"), s.ms, kFloat);
  if (needs_acc) {
    check_pointer(name.of("acc"), s.acc, kFloat);
  }
  return {s.ms, s.acc};
}

OutputView read_output(const Name &name, const mixedkv_output *from, std::int64_t num_heads,
                       std::int64_t len, std::int64_t head_dim_v) {
  const mixedkv_output o = read_struct(name, from, MIXEDKV_FIRST_SIZE(mixedkv_output, index));
  OutputView out;
  if (o.data == nullptr && o.lse == nullptr) {
    return out;
  }
  check_pointer(name.of("data"), o.data, kFloat);
  check_optional(name.of("lse"), o.lse, kFloat);
  check_index(name.of("index"), o.index, len, false);
  if (len > 1) {
    check_apart(name.of("row_stride"), o.row_stride, head_dim_v);
    if (o.lse != nullptr) {
      check_apart(name.of("lse_row_stride"), o.lse_row_stride, 1);
    }
  }
  if (num_heads > 1 && len > 0) {
    check_apart(name.of("head_stride"), o.head_stride, head_dim_v);
    if (o.lse != nullptr) {
      check_apart(name.of("lse_head_stride"), o.lse_head_stride, 1);
    }
  }
  out.data = o.data;
  out.head_stride = o.head_stride;
  out.row_stride = o.row_stride;
  out.lse = o.lse;
  out.lse_head_stride = o.lse_head_stride;
  out.lse_row_stride = o.lse_row_stride;
  out.index = o.index;
  return out;
}

void check_floats(const Name &name, std::int64_t rows, std::int64_t width) {
  check_range(name, rows, 0, PTRDIFF_MAX / 8 / width);
}

} // namespace mixedkv::capi
