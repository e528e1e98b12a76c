// Decode and prefill, through a cache and on plain rows.
#include "filled_cache.h"
#include "kernels/dispatch.h"
#include "mixedkv/attention.h"
#include "registry.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace mixedkv::bench {
namespace {

/// Tokens that a mixed cache keeps in hot where the context is at least twice as long.
constexpr std::int64_t kMixedHot = 1024;
constexpr std::int64_t kPrefillQueries = 512;

/// Queries and outputs, [heads, len, head_dim].
class Attention : public Subject {
public:
  Attention(const Shape &shape, std::int64_t len)
      : shape_(shape), len_(len), q_(random_rows(Format::f32, len * shape.num_qo_heads,
                                                 static_cast<std::size_t>(shape.head_dim), 3)),
        out_(q_.size()) {}
  float result() const override { return sum_of(out_.as<float>(), out_.size() / sizeof(float)); }

protected:
  QueryView queries() const {
    QueryView q;
    q.data = q_.as<float>();
    q.row_stride = shape_.head_dim * static_cast<std::ptrdiff_t>(sizeof(float));
    q.head_stride = len_ * q.row_stride;
    q.len = len_;
    return q;
  }
  OutputView output() const {
    OutputView out;
    out.data = out_.as<float>();
    out.row_stride = shape_.head_dim;
    out.head_stride = len_ * out.row_stride;
    return out;
  }
  float sm_scale() const { return 1.0f / std::sqrt(static_cast<float>(shape_.head_dim)); }

  Shape shape_;
  std::int64_t len_;

private:
  Memory q_;
  Memory out_;
};

/// A pending slot's queries against everything in the cache; may be repeated.
class CacheAttention : public Attention {
public:
  CacheAttention(const Shape &shape, const Fill &fill, ComputeType compute_type)
      : Attention(shape, fill.slot), cache_(shape, fill), compute_type_(compute_type) {}
  void run(const Context &context) override {
    AttendOptions options;
    options.sm_scale = sm_scale();
    options.num_threads = context.threads;
    options.compute_type = compute_type_;
    cache_.get().attend(0, queries(), shape_.num_qo_heads, options, output());
  }

private:
  FilledCache cache_;
  ComputeType compute_type_;
};

/// attend() on rows that lie one after another, ggml's blocks where they are Q4_0.
class RowAttention : public Attention {
public:
  RowAttention(const Shape &shape, std::int64_t len, std::int64_t kv, Format type)
      : Attention(shape, len), kv_(kv), type_(type), k_(rows(4)), v_(rows(5)) {}

  void run(const Context &context) override {
    KeySegment segment;
    segment.k = k_.as<char>();
    segment.v = v_.as<char>();
    segment.k_format = segment.v_format = type_;
    segment.k_row_stride = segment.v_row_stride =
        static_cast<std::ptrdiff_t>(row_bytes(type_, static_cast<std::size_t>(shape_.head_dim)));
    segment.k_head_stride = segment.v_head_stride = kv_ * segment.k_row_stride;
    segment.len = kv_;
    AttentionProblem problem;
    problem.q = queries();
    problem.q.pos_start = kv_ - len_;
    problem.segments = &segment;
    problem.num_segments = 1;
    problem.out = output();
    AttentionParams params;
    params.num_qo_heads = shape_.num_qo_heads;
    params.num_kv_heads = shape_.num_kv_heads;
    params.head_dim = params.head_dim_v = shape_.head_dim;
    params.sm_scale = sm_scale();
    params.causal = true;
    params.num_threads = context.threads;
    attend(&problem, 1, params);
  }

private:
  Memory rows(std::uint64_t seed) const {
    return random_rows(type_, kv_ * shape_.num_kv_heads, static_cast<std::size_t>(shape_.head_dim),
                       seed);
  }

  std::int64_t kv_;
  Format type_;
  Memory k_;
  Memory v_;
};

/// The options with those ISAs alone that have kernels for arithmetic in bf16.
Options where_bf16(Options options) {
  const auto without = [](const std::string &isa) { return kernels_for(isa).bf16 == nullptr; };
  options.isas.erase(std::remove_if(options.isas.begin(), options.isas.end(), without),
                     options.isas.end());
  return options;
}

/// len queries, the last of which stands at the last of kv keys.
void add_contexts(const Options &options, const std::string &kind, const Shape &shape,
                  std::int64_t len, std::int64_t kv) {
  const std::string where = "/" + name_of(shape) + "/" +
                            (len > 1 ? std::to_string(len) + "x" : "") + "kv=" + std::to_string(kv);
  // Query i sees all keys but the len - 1 - i last.
  const double pairs = static_cast<double>(len) * static_cast<double>(kv) -
                       static_cast<double>(len) * static_cast<double>(len - 1) / 2;
  const double ops = 4.0 * shape.num_qo_heads * shape.head_dim * pairs;
  const auto add_cache_on = [&](const Options &on, const std::string &name, const Fill &fill,
                                ComputeType compute_type) {
    const std::size_t bytes = kv_bytes(shape, fill.hot + fill.slot, fill.hot_type) +
                              kv_bytes(shape, fill.cold, Format::q4_0);
    add_benchmarks(on, kind + "/" + name + where, {bytes, ops},
                   [=] { return std::make_unique<CacheAttention>(shape, fill, compute_type); });
  };
  const auto add_cache = [&](const std::string &name, const Fill &fill) {
    add_cache_on(options, name, fill, ComputeType::f32);
  };
  const auto add_rows = [&](const std::string &name, Format type) {
    add_benchmarks(options, kind + "/" + name + where, {kv_bytes(shape, kv, type), ops},
                   [=] { return std::make_unique<RowAttention>(shape, len, kv, type); });
  };

  Fill hot;
  hot.slot = len;
  hot.hot = kv - len;
  add_cache("hot_f16", hot);
  if (len > 1) {
    const Options bf16 = where_bf16(options);
    add_cache_on(bf16, "hot_f16_in_bf16", hot, ComputeType::bf16);
    // The queries' own keys are never in cold: one tier of Q4_0 has all.
    hot.hot_type = Format::q4_0;
    add_cache("hot_q4_0", hot);
    add_cache_on(bf16, "hot_q4_0_in_bf16", hot, ComputeType::bf16);
  }
  if (kv > len) {
    Fill cold;
    cold.slot = len;
    cold.cold = kv - len;
    add_cache("cold_q4_0", cold);
    constexpr int kSeqs = 4;
    if (len == 1 && kv % kSeqs == 0 && kv > kSeqs) {
      // As many keys in all, each of which one query sees.
      Fill several;
      several.slot = several.num_seqs = kSeqs;
      several.cold = kv - kSeqs;
      add_cache("cold_q4_0_of_4_sequences", several);
    }
  }
  if (len == 1 && kv > 2) {
    Fill mixed;
    mixed.hot = std::min(kMixedHot, kv / 2) - 1;
    mixed.cold = kv - 1 - mixed.hot;
    add_cache("mixed_" + std::to_string(mixed.hot + 1) + "+" + std::to_string(mixed.cold), mixed);
  }
  add_rows("rows_f16", Format::f16);
  add_rows("rows_q4_0", Format::q4_0);
}

} // namespace

void add_attention_benchmarks(const Options &options) {
  const std::vector<Shape> models = {{32, 8, 128}, {9, 3, 64}, {32, 32, 128}};
  for (const Shape &shape : chosen(options.shapes, models)) {
    for (const std::int64_t kv : chosen(options.kv, {512, 4096, 32768})) {
      add_contexts(options, "decode", shape, 1, kv);
    }
  }
  for (const Shape &shape : chosen(options.shapes, {models[0]})) {
    for (const std::int64_t kv : chosen(options.kv, {512, 4096})) {
      add_contexts(options, "prefill", shape, std::min(kPrefillQueries, kv), kv);
    }
  }
}

} // namespace mixedkv::bench
