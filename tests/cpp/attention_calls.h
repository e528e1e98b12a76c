// Calls of attend() on segments made by hand: what they should give, by a double loop in float64,
// and what they give with every instruction set that this machine can run, in f32 and in bf16.
#pragma once

#include "attention_sources.h"

namespace testing {

/// Of a row of results, norm over norm: of what was added up where f32 alone rounds, and of the
/// result where kernels of Q4_0 keys and values round besides.
constexpr double kTolerance = 2e-6;
constexpr double kToleranceQ4 = 5e-4;
/// Query, key, weight and value are each rounded to bf16, by 2^-8 at most.
constexpr double kToleranceBf16 = 4.0 / 256;

/// An instruction set of this machine, and the numbers that it computes with.
struct Variant {
  std::string isa;
  ComputeType compute_type;
  std::string name() const { return isa + (compute_type == ComputeType::bf16 ? " in bf16" : ""); }
};

inline const char *variant_filter = "";

/// All that there are, or whose names contain variant_filter.
inline const std::vector<Variant> &variants() {
  static const std::vector<Variant> all = [] {
    std::vector<Variant> found;
    const auto add = [&](const Variant &variant) {
      if (variant.name().find(variant_filter) != std::string::npos)
        found.push_back(variant);
    };
    for (const std::string &isa : available_isas()) {
      add({isa, ComputeType::f32});
      if (kernels_for(isa).bf16 != nullptr)
        add({isa, ComputeType::bf16});
    }
    return found;
  }();
  return all;
}

struct Call {
  int num_qo_heads = 2, num_kv_heads = 1, head_dim = 64, head_dim_v = 64;
  std::int64_t num_queries = 1, q_start = 0;
  std::vector<std::int32_t> q_pos;
  std::vector<float> q; ///< [num_qo_heads, num_queries, head_dim]
  std::vector<const Source *> sources;
  bool causal = false;
  std::int64_t window_left = -1;
  std::int64_t window_right = -1;
  float soft_cap = 0.0f;
  std::vector<float> alibi_slopes;
  MaskType mask_type = MaskType::none;
  std::vector<unsigned char> boolean_mask; ///< [num_qo_heads, num_queries, all keys]
  std::vector<float> float_mask;

  void make_queries(Random &random) {
    q.resize(size(num_qo_heads * num_queries * head_dim));
    for (float &x : q)
      x = normal(random);
  }
  std::int64_t num_keys() const {
    std::int64_t n = 0;
    for (const Source *source : sources)
      n += source->len;
    return n;
  }
  std::int64_t query_position(std::int64_t i) const {
    return q_pos.empty() ? q_start + i : q_pos[size(i)];
  }
  float sm_scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }
  bool uses_q4() const {
    return std::any_of(sources.begin(), sources.end(), [](const Source *s) {
      return s->k.plane.type() == Format::q4_0 || s->v.plane.type() == Format::q4_0;
    });
  }
};

struct Result {
  std::vector<float> out, lse;
  bool operator==(const Result &other) const {
    return std::memcmp(out.data(), other.out.data(), out.size() * 4) == 0 &&
           std::memcmp(lse.data(), other.lse.data(), lse.size() * 4) == 0;
  }
};

/// On num_threads, in the variant's way.
inline Result run(const Call &call, const Variant &variant, int num_threads) {
  select_isa(variant.isa);
  AttentionParams params;
  params.num_qo_heads = call.num_qo_heads;
  params.num_kv_heads = call.num_kv_heads;
  params.head_dim = call.head_dim;
  params.head_dim_v = call.head_dim_v;
  params.sm_scale = call.sm_scale();
  params.logits_soft_cap = call.soft_cap;
  params.causal = call.causal;
  params.window_left = call.window_left;
  params.window_right = call.window_right;
  params.alibi_slopes = call.alibi_slopes.empty() ? nullptr : call.alibi_slopes.data();
  params.num_threads = num_threads;
  params.compute_type = variant.compute_type;
  std::vector<KeySegment> segments;
  for (const Source *source : call.sources)
    segments.push_back(source->segment());
  Result result;
  result.out.assign(size(call.num_qo_heads * call.num_queries * call.head_dim_v), kNan);
  result.lse.assign(size(call.num_qo_heads * call.num_queries), kNan);
  AttentionProblem problem;
  problem.q.data = call.q.data();
  problem.q.row_stride = call.head_dim * 4;
  problem.q.head_stride = call.num_queries * problem.q.row_stride;
  problem.q.pos = call.q_pos.empty() ? nullptr : call.q_pos.data();
  problem.q.pos_start = call.q_start;
  problem.q.len = call.num_queries;
  problem.segments = segments.data();
  problem.num_segments = static_cast<int>(segments.size());
  problem.mask.type = call.mask_type;
  if (call.mask_type != MaskType::none) {
    const bool boolean = call.mask_type == MaskType::boolean;
    problem.mask.data = boolean ? static_cast<const void *>(call.boolean_mask.data())
                                : static_cast<const void *>(call.float_mask.data());
    problem.mask.key_stride = boolean ? 1 : 4;
    problem.mask.query_stride = problem.mask.key_stride * call.num_keys();
    problem.mask.head_stride = problem.mask.query_stride * call.num_queries;
  }
  problem.out.data = result.out.data();
  problem.out.row_stride = call.head_dim_v;
  problem.out.head_stride = call.num_queries * call.head_dim_v;
  problem.out.lse = result.lse.data();
  problem.out.lse_row_stride = 1;
  problem.out.lse_head_stride = call.num_queries;
  attend(&problem, 1, params);
  return result;
}

/// A key that a query sees.
struct Seen {
  std::size_t key;
  double x;
};

/// The keys that query i of head h sees and its logits; k: all keys of all segments.
inline std::vector<Seen> seen_by(const Call &call, const std::vector<std::vector<float>> &k, int h,
                                 std::int64_t i) {
  std::vector<Seen> all;
  const std::size_t row = size(h * call.num_queries + i);
  const float *q = call.q.data() + row * size(call.head_dim);
  const std::int64_t p = call.query_position(i);
  const double slope = call.alibi_slopes.empty() ? 1.0 : call.alibi_slopes[size(h)];
  std::size_t key = 0;
  for (const Source *source : call.sources)
    for (std::int64_t j = 0; j < source->len; ++j, ++key) {
      const std::int64_t pos = source->position(j);
      if ((call.causal && pos > p) || (call.window_right >= 0 && pos > p + call.window_right))
        continue;
      if (call.window_left >= 0 && pos < p - call.window_left)
        continue;
      const std::size_t entry = row * k.size() + key;
      if (call.mask_type == MaskType::boolean && !call.boolean_mask[entry])
        continue;
      if (call.mask_type == MaskType::f32 && call.float_mask[entry] == -kInf)
        continue;
      double x = 0;
      for (int d = 0; d < call.head_dim; ++d)
        x += static_cast<double>(q[d]) * k[key][size(d)];
      x *= call.sm_scale();
      if (call.soft_cap > 0)
        x = call.soft_cap * std::tanh(x / call.soft_cap);
      if (call.mask_type == MaskType::f32)
        x += slope * call.float_mask[entry];
      else if (!call.alibi_slopes.empty())
        x += slope * static_cast<double>(pos - p);
      all.push_back({key, x});
    }
  return all;
}

/// What a call should give, in float64, rows of heads by queries.
struct Expected {
  std::vector<double> out, lse;      ///< lse: -inf where a row sees nothing
  std::vector<double> norm, of_sums; ///< of a row of out, and of what was added up for it
};

inline Expected expected_of(const Call &call) {
  Expected want;
  const int group = call.num_qo_heads / call.num_kv_heads;
  const std::size_t width = size(call.head_dim_v);
  std::vector<std::vector<float>> k, v;
  for (int h = 0; h < call.num_qo_heads; ++h) {
    if (h % group == 0) {
      k.clear();
      v.clear();
      for (const Source *source : call.sources)
        for (std::int64_t j = 0; j < source->len; ++j) {
          k.push_back(source->k.get(h / group, source->cell(j)));
          v.push_back(source->v.get(h / group, source->cell(j)));
        }
    }
    for (std::int64_t i = 0; i < call.num_queries; ++i) {
      const std::vector<Seen> seen = seen_by(call, k, h, i);
      double m = -HUGE_VAL, s = 0;
      for (const Seen &one : seen)
        m = std::max(m, one.x);
      std::vector<double> out(width, 0.0), magnitude = out;
      for (const Seen &one : seen) {
        const double weight = std::exp(one.x - m);
        s += weight;
        for (std::size_t d = 0; d < width; ++d) {
          out[d] += weight * v[one.key][d];
          magnitude[d] += weight * std::fabs(v[one.key][d]);
        }
      }
      double norm = 0, of_sums = 0;
      for (std::size_t d = 0; d < width && !seen.empty(); ++d) {
        out[d] /= s;
        norm += out[d] * out[d];
        of_sums += magnitude[d] / s * (magnitude[d] / s);
      }
      want.out.insert(want.out.end(), out.begin(), out.end());
      want.norm.push_back(std::sqrt(norm));
      want.of_sums.push_back(std::sqrt(of_sums));
      want.lse.push_back(seen.empty() ? -HUGE_VAL : m + std::log(s));
    }
  }
  return want;
}

/// The largest relative error so far, where Q4_0 takes part in f32.
inline double worst_error = 0;

inline void expect_result(const Call &call, const Expected &want, const Variant &variant,
                          const Result &result, const char *what) {
  const bool bf16 = variant.compute_type == ComputeType::bf16, q4 = call.uses_q4() && !bf16;
  const double tolerance = bf16 ? kToleranceBf16 : q4 ? kToleranceQ4 : kTolerance;
  const std::string where = variant.name() + ", " + what;
  const std::size_t width = size(call.head_dim_v);
  for (std::size_t row = 0; row < want.lse.size(); ++row) {
    const float *got = result.out.data() + row * width;
    const int h = static_cast<int>(row / size(call.num_queries));
    const int i = static_cast<int>(row % size(call.num_queries));
    if (want.lse[row] == -HUGE_VAL) {
      for (std::size_t d = 0; d < width; ++d)
        EXPECT(got[d] == 0.0f, "%s: head %d query %d sees nothing", where.c_str(), h, i);
      EXPECT(result.lse[row] == -kInf, "%s: head %d query %d: lse", where.c_str(), h, i);
      continue;
    }
    double error = 0;
    for (std::size_t d = 0; d < width; ++d) {
      const double difference = got[d] - want.out[row * width + d];
      error += difference * difference;
    }
    error = std::sqrt(error) / (q4 ? want.norm : want.of_sums)[row];
    EXPECT(error <= tolerance, "%s: head %d query %d: off by %.3g of its size", where.c_str(), h, i,
           error);
    if (q4)
      worst_error = std::max(worst_error, error);
    EXPECT(std::fabs(result.lse[row] - want.lse[row]) <= tolerance * (1 + std::fabs(want.lse[row])),
           "%s: head %d query %d: lse %.9g, not %.9g", where.c_str(), h, i,
           static_cast<double>(result.lse[row]), want.lse[row]);
  }
}

/// Runs a call in every variant, checks it, and that neither the number of threads nor repetition
/// shows: one of them each time, in turn. What each variant gave.
inline std::vector<Result> check_call(const Call &call, const char *what) {
  static std::size_t num_calls = 0;
  ++num_calls;
  const Expected want = expected_of(call);
  std::vector<Result> results;
  for (const Variant &variant : variants()) {
    results.push_back(run(call, variant, 1));
    expect_result(call, want, variant, results.back(), what);
    const int threads[] = {2, 5, 1};
    const int n = threads[(num_calls + results.size()) % 3];
    EXPECT(run(call, variant, n) == results.back(), "%s, %s: other bits with %d threads",
           variant.name().c_str(), what, n);
  }
  return results;
}

/// Kinds of keys and values: planes hold Q4_0 packed.
constexpr Format kPacked = Format::q4_0;

struct Types {
  Format k, v;
  const char *name;
};
inline const Types kTypes[] = {{kPacked, kPacked, "packed"},
                               {kPacked, Format::f16, "packed keys, f16 values"},
                               {Format::f16, kPacked, "f16 keys, packed values"},
                               {Format::f32, kPacked, "f32 keys, packed values"},
                               {kPacked, Format::f32, "packed keys, f32 values"},
                               {Format::f16, Format::f16, "f16"}};
/// Few rows go through kernels that unpack in registers, many through keys side by side.
inline const int kQueries[] = {1, 2, 3, 5, 8, 33, 70};

inline Call make_call(Random &random, const std::vector<const Source *> &sources,
                      std::int64_t num_queries, int group = 1) {
  Call call;
  call.num_kv_heads = sources[0]->k.heads;
  call.num_qo_heads = call.num_kv_heads * group;
  call.head_dim = sources[0]->k.width;
  call.head_dim_v = sources[0]->v.width;
  call.num_queries = num_queries;
  call.sources = sources;
  call.q_start = call.num_keys() - num_queries;
  call.make_queries(random);
  return call;
}

/// The main of a test that runs checks(types) for every kind.
template <typename F> int run_checks(int argc, char **argv, F &&checks) {
  if (argc > 1)
    name_filter = argv[1];
  if (argc > 2)
    variant_filter = argv[2];
  for (const Types &types : kTypes)
    checks(types);
  return summary();
}

} // namespace testing
