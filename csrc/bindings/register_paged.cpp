// Attention over keys and values in pages, a batch of ragged lengths in one call.
#include "bindings/arrays.h"
#include "bindings/op_views.h"
#include "bindings/threads.h"

#include "mixedkv/attention.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace mixedkv::bindings {
namespace {

/// Offsets of a batch: [batch + 1] from 0 on, not descending, the last at most (or just) `total`.
void check_indptr(const ArrayView &view, const char *name, std::int64_t total, bool exactly,
                  const char *of) {
  const auto *offsets = view.as<const std::int64_t>();
  const auto entry = [&](std::int64_t i) {
    return std::string(name) + "[" + std::to_string(i) + "] = " + std::to_string(offsets[i]);
  };
  if (offsets[0] != 0) {
    throw std::invalid_argument(std::string(name) + " must begin with 0, got " + entry(0));
  }
  const std::int64_t batch = view.shape[0] - 1;
  for (std::int64_t b = 0; b < batch; ++b) {
    if (offsets[b + 1] < offsets[b]) {
      throw std::invalid_argument(std::string(name) + " must not descend, got " + entry(b) +
                                  " and " + entry(b + 1));
    }
  }
  if (exactly ? offsets[batch] != total : offsets[batch] > total) {
    throw std::invalid_argument(std::string(name) + " must end " + (exactly ? "at " : "within ") +
                                of + ", " + std::to_string(total) + ", got " + entry(batch));
  }
}

/// Page numbers as the core takes them.
std::vector<std::int32_t> page_numbers(const ArrayView &indices, std::int64_t count,
                                       std::int64_t num_pages) {
  std::vector<std::int32_t> numbers(static_cast<std::size_t>(count));
  const auto *from = indices.as<const std::int64_t>();
  for (std::int64_t i = 0; i < count; ++i) {
    if (from[i] < 0 || from[i] >= num_pages || from[i] > std::numeric_limits<std::int32_t>::max()) {
      const std::string wanted = num_pages == 0 ? "name no page, since there are none"
                                                : "be from 0 to " + std::to_string(num_pages - 1) +
                                                      ", the number of pages less 1";
      throw std::invalid_argument("indices must " + wanted + ", got indices[" + std::to_string(i) +
                                  "] = " + std::to_string(from[i]));
    }
    numbers[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(from[i]);
  }
  return numbers;
}

/// q [queries, Hq, D]; pages [num_pages, Hkv, page_size, row] of their formats; sequence b has
/// queries qo_indptr[b] to qo_indptr[b + 1] and pages indices[indptr[b] to indptr[b + 1]], of which
/// the last holds last_page_len[b] keys; out [queries, Hq, Dv] and lse [queries, Hq] receive.
void attend_paged(const py::array &q_array, const py::array &k_array, const py::array &v_array,
                  const std::string &k_format, const std::string &v_format,
                  const py::array &qo_indptr_array, const py::array &indptr_array,
                  const py::array &indices_array, const py::array &last_page_len_array,
                  const py::array &out_array, const OptionalArray &lse_array,
                  const OptionalArray &alibi_slopes, const OptionalArray &sinks, double sm_scale,
                  double logits_soft_cap, bool causal, std::int64_t window_left,
                  std::int64_t window_right, int threads, const std::string &compute_type) {
  for (const NamedArray &target : {NamedArray("out", out_array), NamedArray("lse", lse_array)}) {
    check_apart(target, {{"q", q_array},
                         {"k_pages", k_array},
                         {"v_pages", v_array},
                         {"alibi_slopes", alibi_slopes},
                         {"sinks", sinks}});
  }
  const ArrayView q = view_array(q_array, "q", 3, {DType::f32, DType::f16});
  const RowsArray k = view_rows(k_array, "k_pages", 4, parse_format(k_format, "k_format"));
  const RowsArray v = view_rows(v_array, "v_pages", 4, parse_format(v_format, "v_format"));
  const std::int64_t num_queries = q.shape[0];
  const std::int64_t num_qo_heads = q.shape[1];
  const std::int64_t head_dim = q.shape[2];
  const std::int64_t num_pages = k.shape[0];
  const std::int64_t num_kv_heads = k.shape[1];
  const std::int64_t page_size = k.shape[2];
  check_shape(v, "v_pages", {num_pages, num_kv_heads, page_size, v.shape[3]});
  if (k.width != head_dim || head_dim < 1 || v.width < 1 || num_kv_heads < 1 || num_qo_heads < 1 ||
      num_qo_heads % num_kv_heads != 0) {
    throw std::invalid_argument("q and pages don't fit each other: " + q.shape_text() + ", " +
                                k.shape_text() + ", " + v.shape_text());
  }
  if (page_size < 1) {
    throw std::invalid_argument("pages must hold a key or more, got shape " + k.shape_text());
  }
  const ArrayView indptr = view_contiguous(indptr_array, "indptr", 1, {DType::i64});
  const ArrayView indices = view_contiguous(indices_array, "indices", 1, {DType::i64});
  const ArrayView last = view_contiguous(last_page_len_array, "last_page_len", 1, {DType::i64});
  const ArrayView qo_indptr = view_contiguous(qo_indptr_array, "qo_indptr", 1, {DType::i64});
  const std::int64_t batch = last.shape[0];
  check_shape(indptr, "indptr", {batch + 1});
  check_shape(qo_indptr, "qo_indptr", {batch + 1});
  check_indptr(indptr, "indptr", indices.shape[0], false, "indices");
  check_indptr(qo_indptr, "qo_indptr", num_queries, true, "the number of queries");
  const auto *first_page = indptr.as<const std::int64_t>();
  const auto *first_query = qo_indptr.as<const std::int64_t>();
  const auto *last_len = last.as<const std::int64_t>();
  const std::vector<std::int32_t> numbers = page_numbers(indices, first_page[batch], num_pages);

  const ArrayView out = view_array(out_array, "out", 3, {DType::f32}, Access::write);
  check_shape(out, "out", {num_queries, num_qo_heads, v.width});
  ArrayView lse;
  if (lse_array) {
    lse = view_array(*lse_array, "lse", 2, {DType::f32}, Access::write, false);
    check_shape(lse, "lse", {num_queries, num_qo_heads});
  }

  AttentionParams params = read_params({num_qo_heads, num_kv_heads, head_dim, v.width},
                                       {sm_scale, logits_soft_cap, causal, window_left,
                                        window_right, alibi_slopes, sinks, threads, compute_type});
  params.cut_alone = true; // a sequence's bits don't depend on what it is batched with

  std::vector<KeySegment> segments(static_cast<std::size_t>(batch));
  std::vector<AttentionProblem> problems(static_cast<std::size_t>(batch));
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::int64_t pages = first_page[b + 1] - first_page[b];
    if (pages > 0 && (last_len[b] < 1 || last_len[b] > page_size)) {
      throw std::invalid_argument("last_page_len must be from 1 to page_size, " +
                                  std::to_string(page_size) + ", got last_page_len[" +
                                  std::to_string(b) + "] = " + std::to_string(last_len[b]));
    }
    KeySegment &segment = segments[static_cast<std::size_t>(b)];
    segment.k = k.data;
    segment.v = v.data;
    segment.k_format = k.format;
    segment.v_format = v.format;
    segment.k_page_stride = k.strides[0];
    segment.v_page_stride = v.strides[0];
    segment.k_head_stride = k.strides[1];
    segment.v_head_stride = v.strides[1];
    segment.k_row_stride = k.strides[2];
    segment.v_row_stride = v.strides[2];
    segment.pages = numbers.data() + first_page[b];
    segment.page_size = page_size;
    segment.len = pages > 0 ? (pages - 1) * page_size + last_len[b] : 0;

    AttentionProblem &problem = problems[static_cast<std::size_t>(b)];
    const std::int64_t query = first_query[b];
    problem.q.data = q.data + query * q.strides[0];
    problem.q.type = plain_format(q.dtype);
    problem.q.row_stride = q.strides[0];
    problem.q.head_stride = q.strides[1];
    problem.q.len = first_query[b + 1] - query;
    problem.q.pos_start = segment.len - problem.q.len; // the last query stands at the last key
    problem.segments = &segment;
    problem.num_segments = 1;
    problem.out = output_view(out.data + query * out.strides[0], out.strides[1], out.strides[0]);
    if (lse_array) {
      set_lse(problem.out, lse.data + query * lse.strides[0], lse.strides[1], lse.strides[0]);
    }
  }
  GilRelease release;
  attend(problems.data(), narrow(batch, "batch"), params);
}

} // namespace

void register_paged(py::module_ &m) {
  m.def("attend_paged", &attend_paged, py::arg("q"), py::arg("k_pages"), py::arg("v_pages"),
        py::arg("k_format"), py::arg("v_format"), py::arg("qo_indptr"), py::arg("indptr"),
        py::arg("indices"), py::arg("last_page_len"), py::arg("out"), py::arg("lse"),
        py::arg("alibi_slopes"), py::arg("sinks"), py::arg("sm_scale"), py::arg("logits_soft_cap"),
        py::arg("causal"), py::arg("window_left"), py::arg("window_right"), py::arg("threads"),
        py::arg("compute_type"));
}

} // namespace mixedkv::bindings
