// Attention on arrays, and the algebra of states.
#include "bindings/arrays.h"
#include "bindings/op_views.h"
#include "bindings/threads.h"

#include "mixedkv/attention.h"

#include <pybind11/stl.h>

#include <vector>

namespace mixedkv::bindings {
namespace {

/// q [B, Hq, Lq, D], k [B, Hkv, Lkv, row] of k_format, v likewise; ms [B, Hq * Lq, 2] and acc
/// [B, Hq * Lq, Dv] continue and are continued, out [B, Hq, Lq, Dv] and lse [B, Hq, Lq] receive;
/// mask [B, Hq, Lq, Lkv].
void attend_arrays(const py::array &q_array, const py::array &k_array, const py::array &v_array,
                   const std::string &k_format, const std::string &v_format,
                   const OptionalArray &ms_array, const OptionalArray &acc_array,
                   const OptionalArray &out_array, const OptionalArray &lse_array,
                   const OptionalArray &mask_array, const OptionalArray &alibi_slopes,
                   const OptionalArray &sinks, double sm_scale, double logits_soft_cap, bool causal,
                   std::int64_t window_left, std::int64_t window_right, std::int64_t q_start,
                   std::int64_t kv_start, int threads, const std::string &compute_type) {
  for (const NamedArray &target :
       {NamedArray("out", out_array), NamedArray("lse", lse_array),
        NamedArray("the state's ms", ms_array), NamedArray("the state's acc", acc_array)}) {
    check_apart(target, {{"q", q_array},
                         {"k", k_array},
                         {"v", v_array},
                         {"mask", mask_array},
                         {"alibi_slopes", alibi_slopes},
                         {"sinks", sinks}});
  }
  const ArrayView q = view_array(q_array, "q", 4, {DType::f32, DType::f16});
  const RowsArray k = view_rows(k_array, "k", 4, parse_format(k_format, "k_format"));
  const RowsArray v = view_rows(v_array, "v", 4, parse_format(v_format, "v_format"));
  const std::int64_t batch = q.shape[0];
  const std::int64_t num_qo_heads = q.shape[1];
  const std::int64_t qo_len = q.shape[2];
  const std::int64_t num_kv_heads = k.shape[1];
  const std::int64_t kv_len = k.shape[2];
  const std::int64_t head_dim = q.shape[3];
  const std::int64_t head_dim_v = v.width;
  check_shape(k, "k", {batch, num_kv_heads, kv_len, k.shape[3]});
  check_shape(v, "v", {batch, num_kv_heads, kv_len, v.shape[3]});
  if (k.width != head_dim || head_dim < 1 || head_dim_v < 1 || num_kv_heads < 1 ||
      num_qo_heads % num_kv_heads != 0) {
    throw std::invalid_argument("q, k and v don't fit each other: " + q.shape_text() + ", " +
                                k.shape_text() + ", " + v.shape_text());
  }

  const AttentionParams params =
      read_params({num_qo_heads, num_kv_heads, head_dim, head_dim_v},
                  {sm_scale, logits_soft_cap, causal, window_left, window_right, alibi_slopes,
                   sinks, threads, compute_type});

  ArrayView ms;
  ArrayView acc;
  if (ms_array.has_value() != acc_array.has_value() || (!ms_array && !out_array)) {
    throw std::invalid_argument("ms and acc must come together, or out must be given");
  }
  if (ms_array) {
    ms = view_contiguous(*ms_array, "ms", 3, {DType::f32}, Access::write);
    acc = view_contiguous(*acc_array, "acc", 3, {DType::f32}, Access::write);
    check_shape(ms, "ms", {batch, num_qo_heads * qo_len, 2});
    check_shape(acc, "acc", {batch, num_qo_heads * qo_len, head_dim_v});
  }
  ArrayView out;
  if (out_array) {
    out = view_array(*out_array, "out", 4, {DType::f32}, Access::write);
    check_shape(out, "out", {batch, num_qo_heads, qo_len, head_dim_v});
  }
  ArrayView lse;
  if (lse_array) {
    lse = view_array(*lse_array, "lse", 3, {DType::f32}, Access::write, false);
    check_shape(lse, "lse", {batch, num_qo_heads, qo_len});
  }
  ArrayView mask;
  if (mask_array) {
    mask = view_array(*mask_array, "mask", 4, {DType::f32, DType::f16, DType::boolean},
                      Access::read, false);
    check_shape(mask, "mask", {batch, num_qo_heads, qo_len, kv_len});
  }

  std::vector<KeySegment> segments(batch);
  std::vector<AttentionProblem> problems(batch);
  for (std::int64_t b = 0; b < batch; ++b) {
    KeySegment &segment = segments[b];
    segment.k = k.data + b * k.strides[0];
    segment.v = v.data + b * v.strides[0];
    segment.k_format = k.format;
    segment.v_format = v.format;
    segment.k_head_stride = k.strides[1];
    segment.k_row_stride = k.strides[2];
    segment.v_head_stride = v.strides[1];
    segment.v_row_stride = v.strides[2];
    segment.pos_start = kv_start;
    segment.len = kv_len;

    AttentionProblem &problem = problems[b];
    problem.q.data = q.data + b * q.strides[0];
    problem.q.type = plain_format(q.dtype);
    problem.q.head_stride = q.strides[1];
    problem.q.row_stride = q.strides[2];
    problem.q.pos_start = q_start;
    problem.q.len = qo_len;
    problem.segments = &segment;
    problem.num_segments = 1;
    if (mask_array) {
      problem.mask.type = mask.dtype == DType::f32   ? MaskType::f32
                          : mask.dtype == DType::f16 ? MaskType::f16
                                                     : MaskType::boolean;
      problem.mask.data = mask.data + b * mask.strides[0];
      problem.mask.head_stride = mask.strides[1];
      problem.mask.query_stride = mask.strides[2];
      problem.mask.key_stride = mask.strides[3];
    }
    if (ms_array) {
      const std::int64_t rows = num_qo_heads * qo_len;
      problem.state = {ms.as<float>() + b * rows * 2, acc.as<float>() + b * rows * head_dim_v};
    }
    if (out_array) {
      problem.out = output_view(out.data + b * out.strides[0], out.strides[1], out.strides[2]);
      if (lse_array) {
        set_lse(problem.out, lse.data + b * lse.strides[0], lse.strides[1], lse.strides[2]);
      }
    }
  }
  GilRelease release;
  attend(problems.data(), narrow(batch, "batch"), params);
}

/// ms [B, Hq * Lq, 2], acc [B, Hq * Lq, Dv], out [B, Hq, Lq, Dv], lse [B, Hq, Lq].
void finalize_arrays(const py::array &ms_array, const py::array &acc_array,
                     const OptionalArray &sinks_array, const py::array &out_array,
                     const py::array &lse_array) {
  for (const NamedArray &target : {NamedArray("out", out_array), NamedArray("lse", lse_array)}) {
    check_apart(target, {{"ms", ms_array}, {"acc", acc_array}, {"sinks", sinks_array}});
  }
  const ArrayView out = view_array(out_array, "out", 4, {DType::f32}, Access::write);
  const std::int64_t batch = out.shape[0];
  const std::int64_t heads = out.shape[1];
  const std::int64_t len = out.shape[2];
  const std::int64_t width = out.shape[3];
  const ArrayView ms = view_contiguous(ms_array, "ms", 3, {DType::f32});
  const ArrayView acc = view_contiguous(acc_array, "acc", 3, {DType::f32});
  const ArrayView lse = view_contiguous(lse_array, "lse", 3, {DType::f32}, Access::write);
  check_shape(ms, "ms", {batch, heads * len, 2});
  check_shape(acc, "acc", {batch, heads * len, width});
  check_shape(lse, "lse", {batch, heads, len});
  const float *sinks = per_head(sinks_array, "sinks", heads);
  const int num_heads = narrow(heads, "num_qo_heads");
  const int head_dim_v = narrow(width, "head_dim");
  GilRelease release;
  for (std::int64_t b = 0; b < batch; ++b) {
    OutputView to = output_view(out.data + b * out.strides[0], out.strides[1], out.strides[2]);
    // As contiguous as it is, numpy's strides along an axis of one entry mean nothing.
    set_lse(to, lse.data + b * heads * len * kFloatSize, len * kFloatSize, kFloatSize);
    finalize({ms.as<float>() + b * heads * len * 2, acc.as<float>() + b * heads * len * width},
             num_heads, len, head_dim_v, sinks, to);
  }
}

/// ms [B, rows, 2], acc [B, rows, Dv].
void merge_arrays(const py::array &ms_a, const py::array &acc_a, const py::array &ms_b,
                  const py::array &acc_b) {
  for (const NamedArray &target : {NamedArray("ms_a", ms_a), NamedArray("acc_a", acc_a)}) {
    check_apart(target, {{"ms_b", ms_b}, {"acc_b", acc_b}});
  }
  const ArrayView a_ms = view_contiguous(ms_a, "ms_a", 3, {DType::f32}, Access::write);
  const ArrayView a_acc = view_contiguous(acc_a, "acc_a", 3, {DType::f32}, Access::write);
  const ArrayView b_ms = view_contiguous(ms_b, "ms_b", 3, {DType::f32});
  const ArrayView b_acc = view_contiguous(acc_b, "acc_b", 3, {DType::f32});
  const std::int64_t batch = a_acc.shape[0];
  const std::int64_t rows = a_acc.shape[1];
  check_shape(a_ms, "ms_a", {batch, rows, 2});
  check_shape(b_ms, "ms_b", {batch, rows, 2});
  check_shape(b_acc, "acc_b", {batch, rows, a_acc.shape[2]});
  const int width = narrow(a_acc.shape[2], "head_dim");
  GilRelease release;
  merge({a_ms.as<float>(), a_acc.as<float>()}, {b_ms.as<float>(), b_acc.as<float>()}, batch * rows,
        width);
}

/// outs [N, rows, Dv], lses [N, rows] -> out [rows, Dv], lse [rows].
void merge_states_arrays(const py::array &outs_array, const py::array &lses_array,
                         const py::array &out_array, const py::array &lse_array) {
  for (const NamedArray &target : {NamedArray("out", out_array), NamedArray("lse", lse_array)}) {
    check_apart(target, {{"outs", outs_array}, {"lses", lses_array}});
  }
  const ArrayView outs = view_contiguous(outs_array, "outs", 3, {DType::f32});
  const ArrayView lses = view_contiguous(lses_array, "lses", 2, {DType::f32});
  const ArrayView out = view_contiguous(out_array, "out", 2, {DType::f32}, Access::write);
  const ArrayView lse = view_contiguous(lse_array, "lse", 1, {DType::f32}, Access::write);
  check_shape(lses, "lses", {outs.shape[0], outs.shape[1]});
  check_shape(out, "out", {outs.shape[1], outs.shape[2]});
  check_shape(lse, "lse", {outs.shape[1]});
  const int count = narrow(outs.shape[0], "N");
  const int width = narrow(outs.shape[2], "head_dim");
  GilRelease release;
  merge_states(outs.as<float>(), lses.as<float>(), count, outs.shape[1], width, out.as<float>(),
               lse.as<float>());
}

} // namespace

void register_attention(py::module_ &m) {
  m.def("attend", &attend_arrays, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("k_format"),
        py::arg("v_format"), py::arg("ms"), py::arg("acc"), py::arg("out"), py::arg("lse"),
        py::arg("mask"), py::arg("alibi_slopes"), py::arg("sinks"), py::arg("sm_scale"),
        py::arg("logits_soft_cap"), py::arg("causal"), py::arg("window_left"),
        py::arg("window_right"), py::arg("q_start"), py::arg("kv_start"), py::arg("threads"),
        py::arg("compute_type"));
  m.def("finalize", &finalize_arrays, py::arg("ms"), py::arg("acc"), py::arg("sinks"),
        py::arg("out"), py::arg("lse"));
  m.def("merge", &merge_arrays, py::arg("ms_a"), py::arg("acc_a"), py::arg("ms_b"),
        py::arg("acc_b"));
  m.def("merge_states", &merge_states_arrays, py::arg("outs"), py::arg("lses"), py::arg("out"),
        py::arg("lse"));
  // A context manager.
  py::class_<Guard>(m, "Guard")
      .def(py::init<std::string>(), py::arg("what"))
      .def("__enter__",
           [](Guard &guard) -> Guard & {
             guard.enter();
             return guard;
           })
      .def("__exit__", [](Guard &guard, const py::object &, const py::object &,
                          const py::object &) { guard.leave(); });
}

} // namespace mixedkv::bindings
