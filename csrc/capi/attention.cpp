// The op and the algebra of states: the caller's structures checked and turned into the core's.
#include "capi/views.h"

#include "mixedkv/attention.h"

#include <cmath>
#include <limits>
#include <vector>

namespace mixedkv::capi {
namespace {

/// What the problems of a call turn into; kept from call to call, a thread's own, so that a decode
/// step allocates nothing.
struct Workspace {
  std::vector<AttentionProblem> problems;
  std::vector<KeySegment> segments;
};

Workspace &workspace() {
  static thread_local Workspace instance;
  return instance;
}

/// One side of a window as the core has it: -1 for none.
std::int64_t read_window(const Name &name, std::int64_t value, std::uint32_t flags,
                         std::uint32_t flag, const char *flag_name) {
  if ((flags & flag) == 0) {
    if (value != 0) {
      refuse(MIXEDKV_INVALID_ARGUMENT, "%s is %lld, and params.flags lacks %s", name.text().data,
             static_cast<long long>(value), flag_name);
    }
    return -1;
  }
  check_range(name, value, 0, kMostWindow);
  return value;
}

AttentionParams read_params(const mixedkv_params *from) {
  const mixedkv_params p =
      read_struct("params", from, MIXEDKV_FIRST_SIZE(mixedkv_params, reserved));
  check_range("params.num_qo_heads", p.num_qo_heads, 1, kMostHeads);
  check_range("params.num_kv_heads", p.num_kv_heads, 1, kMostHeads);
  check_multiple("params.num_qo_heads", p.num_qo_heads, p.num_kv_heads);
  check_range("params.head_dim", p.head_dim, 1, kMostDim);
  check_range("params.head_dim_v", p.head_dim_v, 0, kMostDim);
  check_flags("params.flags", p.flags, MIXEDKV_CAUSAL | MIXEDKV_WINDOW_LEFT | MIXEDKV_WINDOW_RIGHT);
  if (!std::isfinite(p.sm_scale)) {
    refuse(MIXEDKV_INVALID_ARGUMENT, "params.sm_scale must be finite, got %g",
           static_cast<double>(p.sm_scale));
  }
  if (!std::isfinite(p.logits_soft_cap) || p.logits_soft_cap < 0) {
    refuse(MIXEDKV_INVALID_ARGUMENT,
           "params.logits_soft_cap must be finite and not negative, got %g",
           static_cast<double>(p.logits_soft_cap));
  }
  if (p.logits_soft_cap > 0 && p.logits_soft_cap < std::numeric_limits<float>::min()) {
    refuse(MIXEDKV_INVALID_ARGUMENT,
           "params.logits_soft_cap must be 0 (none) or 1.17549435e-38 (2**-126) or more, got %g",
           static_cast<double>(p.logits_soft_cap));
  }
  check_range("params.compute_type", p.compute_type, MIXEDKV_COMPUTE_F32, MIXEDKV_COMPUTE_AUTO);
  check_optional("params.alibi_slopes", p.alibi_slopes, kFloat);
  check_optional("params.sinks", p.sinks, kFloat);
  check_range("params.num_threads", p.num_threads, 0, kMostThreads);
  check_zero("params.reserved", p.reserved);

  AttentionParams params;
  params.num_qo_heads = p.num_qo_heads;
  params.num_kv_heads = p.num_kv_heads;
  params.head_dim = p.head_dim;
  params.head_dim_v = p.head_dim_v > 0 ? p.head_dim_v : p.head_dim;
  params.sm_scale = p.sm_scale != 0.0f
                        ? p.sm_scale
                        : static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.head_dim)));
  params.logits_soft_cap = p.logits_soft_cap;
  params.causal = (p.flags & MIXEDKV_CAUSAL) != 0;
  params.window_left = read_window("params.window_left", p.window_left, p.flags,
                                   MIXEDKV_WINDOW_LEFT, "MIXEDKV_WINDOW_LEFT");
  params.window_right = read_window("params.window_right", p.window_right, p.flags,
                                    MIXEDKV_WINDOW_RIGHT, "MIXEDKV_WINDOW_RIGHT");
  params.alibi_slopes = p.alibi_slopes;
  params.sinks = p.sinks;
  params.num_threads = p.num_threads;
  params.compute_type = p.compute_type == MIXEDKV_COMPUTE_AUTO   ? ComputeType::automatic
                        : p.compute_type == MIXEDKV_COMPUTE_BF16 ? ComputeType::bf16
                                                                 : ComputeType::f32;
  return params;
}

AttentionProblem read_problem(std::int64_t number, const mixedkv_problem &p,
                              const AttentionParams &params, KeySegment *segments) {
  AttentionProblem problem;
  problem.q = read_queries(number, p.q);
  problem.segments = segments;
  problem.num_segments = static_cast<int>(p.num_segments);
  std::int64_t num_keys = 0;
  for (std::int64_t s = 0; s < p.num_segments; ++s) {
    segments[s] = read_segment(number, s, p.segments, params);
    num_keys += segments[s].len;
  }
  if (p.mask != nullptr) {
    problem.mask = read_mask(number, p.mask, problem.q.len > 0 && num_keys > 0);
  }
  check_floats(Name(number, "q.len"), problem.q.len * params.num_qo_heads, params.head_dim_v);
  if (p.state != nullptr) {
    problem.state = read_state(Name(number, "state"), p.state, problem.q.len > 0);
  }
  if (p.out != nullptr) {
    problem.out = read_output(Name(number, "out"), p.out, params.num_qo_heads, problem.q.len,
                              params.head_dim_v);
  }
  if (p.state == nullptr && problem.out.data == nullptr) {
    refuse(MIXEDKV_INVALID_ARGUMENT, "%s must have a state, or an out with data",
           Name(number, "").text().data);
  }
  return problem;
}

void attend_problems(const mixedkv_problem *from, std::int64_t num_problems,
                     const mixedkv_params *params_from) {
  constexpr std::size_t kLeast = MIXEDKV_FIRST_SIZE(mixedkv_problem, out);
  const AttentionParams params = read_params(params_from);
  check_range("num_problems", num_problems, 0, kMostLen);
  if (num_problems == 0) {
    return;
  }
  check_pointer("problems", from, alignof(mixedkv_problem));
  const std::size_t size = check_size(Name(0, ""), from, kLeast);
  std::int64_t num_segments = 0;
  for (std::int64_t i = 0; i < num_problems; ++i) {
    const mixedkv_problem *at = element(from, size, i);
    check_same_size(Name(i, ""), check_size(Name(i, ""), at, kLeast), size);
    const mixedkv_problem p = read_struct(Name(i, ""), at, kLeast);
    check_range(Name(i, "num_segments"), p.num_segments, 0, kMostLen);
    if (p.num_segments > 0) {
      check_pointer(Name(i, "segments"), p.segments, alignof(mixedkv_segment));
    }
    num_segments += p.num_segments;
  }
  Workspace &work = workspace();
  work.problems.resize(static_cast<std::size_t>(num_problems));
  work.segments.resize(static_cast<std::size_t>(num_segments));
  KeySegment *segments = work.segments.data();
  for (std::int64_t i = 0; i < num_problems; ++i) {
    const mixedkv_problem p = read_struct(Name(i, ""), element(from, size, i), kLeast);
    work.problems[static_cast<std::size_t>(i)] = read_problem(i, p, params, segments);
    segments += p.num_segments;
  }
  attend(work.problems.data(), static_cast<int>(num_problems), params);
}

} // namespace
} // namespace mixedkv::capi

using namespace mixedkv;
using namespace mixedkv::capi;

mixedkv_status mixedkv_attend(const mixedkv_problem *problems, int64_t num_problems,
                              const mixedkv_params *params) {
  return guarded([&] { attend_problems(problems, num_problems, params); });
}

mixedkv_status mixedkv_state_init(const mixedkv_state *state, int64_t num_rows) {
  return guarded([&] {
    check_floats("num_rows", num_rows, 2);
    const StateView view = read_state("state", state, false);
    for (std::int64_t row = 0; row < num_rows; ++row) {
      view.ms[2 * row] = -INFINITY;
      view.ms[2 * row + 1] = 0.0f;
    }
  });
}

mixedkv_status mixedkv_finalize(const mixedkv_state *state, int32_t num_qo_heads, int64_t len,
                                int32_t head_dim_v, const float *sinks, const mixedkv_output *out) {
  return guarded([&] {
    check_range("num_qo_heads", num_qo_heads, 1, kMostHeads);
    check_range("len", len, 0, kMostLen);
    check_range("head_dim_v", head_dim_v, 1, kMostDim);
    check_floats("len", len * num_qo_heads, head_dim_v);
    check_optional("sinks", sinks, kFloat);
    const StateView view = read_state("state", state);
    const OutputView to = read_output("out", out, num_qo_heads, len, head_dim_v);
    check_pointer("out.data", to.data, kFloat);
    finalize(view, num_qo_heads, len, head_dim_v, sinks, to);
  });
}

mixedkv_status mixedkv_merge(const mixedkv_state *a, const mixedkv_state *b, int64_t num_rows,
                             int32_t head_dim_v) {
  return guarded([&] {
    check_range("head_dim_v", head_dim_v, 1, kMostDim);
    check_floats("num_rows", num_rows, head_dim_v);
    const StateView to = read_state("a", a);
    const StateView from = read_state("b", b);
    merge(to, from, num_rows, head_dim_v);
  });
}

mixedkv_status mixedkv_merge_states(const float *outs, const float *lses, int64_t num_states,
                                    int64_t num_rows, int32_t head_dim_v, float *out, float *lse) {
  return guarded([&] {
    check_range("num_states", num_states, 1, kMostLen);
    check_range("head_dim_v", head_dim_v, 1, kMostDim);
    check_floats("num_rows", num_rows, head_dim_v);
    check_floats("num_states", num_states, head_dim_v * (num_rows > 0 ? num_rows : 1));
    if (num_rows == 0) {
      return;
    }
    check_pointer("outs", outs, kFloat);
    check_pointer("lses", lses, kFloat);
    check_pointer("out", out, kFloat);
    check_pointer("lse", lse, kFloat);
    merge_states(outs, lses, static_cast<int>(num_states), num_rows, head_dim_v, out, lse);
  });
}
