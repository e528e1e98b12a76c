// Kernels of the table alone: one of attention's two products over all keys, in the chunks in which
// attention calls it, and what works on one chunk.
#include "attention/sizes.h"
#include "data.h"
#include "formats/token_tile.h"
#include "registry.h"
#include "runtime/parallel.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

namespace mixedkv::bench {
namespace {

constexpr std::size_t kLdScores = kChunkKeys + kScoresPad;
/// Rows and keys of a full tile, as in prefill.
constexpr int kRowsFullTile = kTileRows;
constexpr int kKeysFullTile = kChunkKeysFullTile;

/// The query heads of each kv head against its keys (or values), chunk by chunk.
class KernelOverKeys : public Subject {
public:
  /// rows: K or V of one kv head after another, head_bytes apart.
  KernelOverKeys(const Shape &shape, std::int64_t kv, int max_threads, Memory rows,
                 std::size_t row_stride)
      : head_dim_(shape.head_dim), num_heads_(shape.num_kv_heads),
        group_(shape.num_qo_heads / shape.num_kv_heads), kv_(kv), rows_(std::move(rows)),
        row_stride_(row_stride),
        out_floats_(static_cast<std::size_t>(group_) * std::max(kLdScores, size(head_dim_))),
        out_(out_floats_ * sizeof(float) * static_cast<std::size_t>(max_threads)) {}
  float result() const override { return sum_of(out_.as<float>(), out_floats_); }

protected:
  static std::size_t size(int n) { return static_cast<std::size_t>(n); }

  /// call(head, rows of a chunk, number of its keys, the worker's output), on all chunks.
  template <typename F>
  void each_chunk(int threads, int rows_per_stride, std::int64_t strides_per_head, F &&call) {
    const std::int64_t chunks = (kv_ + kChunkKeys - 1) / kChunkKeys;
    parallel_for(chunks * num_heads_, threads, [&](std::int64_t unit, int worker) {
      const std::int64_t head = unit / chunks;
      const std::int64_t begin = unit % chunks * kChunkKeys;
      const std::int64_t stride = head * strides_per_head + begin / rows_per_stride;
      const Rows rows{rows_.as<char>() + static_cast<std::size_t>(stride) * row_stride_,
                      static_cast<std::ptrdiff_t>(row_stride_), nullptr};
      call(size(static_cast<int>(head)), rows,
           static_cast<int>(std::min<std::int64_t>(kChunkKeys, kv_ - begin)),
           out_.as<float>() + out_floats_ * size(worker));
    });
  }

  int head_dim_;
  int num_heads_;
  int group_;
  std::int64_t kv_;

private:
  Memory rows_;
  std::size_t row_stride_;
  std::size_t out_floats_; ///< a worker
  Memory out_;
};

Memory rows_of(const Shape &shape, std::int64_t kv, Format type) {
  return random_rows(type, kv * shape.num_kv_heads, static_cast<std::size_t>(shape.head_dim), 8);
}

Memory queries_of(const Shape &shape) {
  return random_rows(Format::f32, shape.num_qo_heads, static_cast<std::size_t>(shape.head_dim), 9);
}

/// Weights of a chunk, from 0 to 1 / kChunkKeys, so that sums stay small.
Memory weights_of(int num_rows) {
  Memory memory = random_rows(Format::f32, num_rows, kLdScores, 10);
  float *p = memory.as<float>();
  for (std::size_t i = 0; i < memory.size() / sizeof(float); ++i) {
    p[i] = std::min(std::abs(p[i]) * 0.25f, 1.0f) / kChunkKeys;
  }
  return memory;
}

class Qk : public KernelOverKeys {
public:
  Qk(const Shape &shape, std::int64_t kv, int max_threads, Format type)
      : KernelOverKeys(shape, kv, max_threads, rows_of(shape, kv, type),
                       row_bytes(type, size(shape.head_dim))),
        type_(type), q_(queries_of(shape)) {}
  void run(const Context &context) override {
    const auto qk = context.kernels->of(type_).qk;
    const std::size_t d = size(head_dim_);
    each_chunk(context.threads, 1, kv_,
               [&](std::size_t head, const Rows &rows, int num_keys, float *scores) {
                 qk(q_.as<float>() + head * size(group_) * d, d, group_, &rows, num_keys, head_dim_,
                    scores, kLdScores);
               });
  }

private:
  Format type_;
  Memory q_;
};

class Pv : public KernelOverKeys {
public:
  Pv(const Shape &shape, std::int64_t kv, int max_threads, Format type)
      : KernelOverKeys(shape, kv, max_threads, rows_of(shape, kv, type),
                       row_bytes(type, size(shape.head_dim))),
        type_(type), p_(weights_of(group_)) {}
  void run(const Context &context) override {
    const auto pv = context.kernels->of(type_).pv;
    each_chunk(
        context.threads, 1, kv_, [&](std::size_t, const Rows &rows, int num_keys, float *acc) {
          pv(p_.as<float>(), kLdScores, group_, &rows, num_keys, head_dim_, acc, size(head_dim_));
        });
  }

private:
  Format type_;
  Memory p_;
};

class QkTiles : public KernelOverKeys {
public:
  QkTiles(const Shape &shape, std::int64_t kv, int max_threads)
      : KernelOverKeys(shape, kv, max_threads,
                       random_key_tiles(shape.num_kv_heads, kv, shape.head_dim),
                       tile_bytes(Format::q4_0, size(shape.head_dim))),
        q_(queries_of(shape)), prepared_(size(shape.num_qo_heads) *
                                         tile_query_floats(size(shape.head_dim)) * sizeof(float)) {}
  void prepare(const Context &context) override {
    context.kernels->tiles_of(Format::q4_0)
        ->prepare_query(q_.as<float>(), size(head_dim_), num_heads_ * group_, head_dim_,
                        prepared_.as<float>());
  }
  void run(const Context &context) override {
    const auto qk = context.kernels->tiles_of(Format::q4_0)->qk;
    const std::size_t ld = tile_query_floats(size(head_dim_));
    each_chunk(context.threads, kTileTokens, tiles_of(kv_),
               [&](std::size_t head, const Rows &tiles, int num_keys, float *scores) {
                 qk(prepared_.as<float>() + head * size(group_) * ld, group_, &tiles,
                    static_cast<int>(tiles_of(num_keys)), head_dim_, scores, kLdScores);
               });
  }

private:
  Memory q_;
  Memory prepared_;
};

class PvTiles : public KernelOverKeys {
public:
  PvTiles(const Shape &shape, std::int64_t kv, int max_threads)
      : KernelOverKeys(shape, kv, max_threads,
                       random_value_tiles(shape.num_kv_heads, kv, shape.head_dim),
                       tile_bytes(Format::q4_0, size(shape.head_dim))),
        p_(weights_of(group_)) {}
  void run(const Context &context) override {
    const auto pv = context.kernels->tiles_of(Format::q4_0)->pv;
    each_chunk(context.threads, kTileTokens, tiles_of(kv_),
               [&](std::size_t, const Rows &tiles, int num_keys, float *acc) {
                 pv(p_.as<float>(), kLdScores, group_, &tiles, static_cast<int>(tiles_of(num_keys)),
                    head_dim_, acc, size(head_dim_));
               });
  }

private:
  Memory p_;
};

/// A full tile's query rows against a chunk of keys side by side, for each kv head.
class QkTransposed : public Subject {
public:
  explicit QkTransposed(const Shape &shape)
      : num_heads_(shape.num_kv_heads), head_dim_(shape.head_dim),
        q_(random_rows(Format::f32, kRowsFullTile, dim(), 13)),
        keys_(random_rows(Format::f32, std::int64_t{num_heads_} * kKeysFullTile, dim(), 14)),
        scores_(kScores * sizeof(float) * static_cast<std::size_t>(num_heads_)) {}
  void run(const Context &context) override {
    parallel_for(num_heads_, context.threads, [&](std::int64_t unit) {
      const std::size_t head = static_cast<std::size_t>(unit);
      context.kernels->qk_transposed(q_.as<float>(), dim(), kRowsFullTile,
                                     keys_.as<float>() + head * kKeysFullTile * dim(),
                                     kKeysFullTile / kTileTokens, head_dim_,
                                     scores_.as<float>() + head * kScores, kLdFullTile);
    });
  }
  float result() const override {
    return sum_of(scores_.as<float>(), scores_.size() / sizeof(float));
  }

private:
  static constexpr std::size_t kLdFullTile = kKeysFullTile + kScoresPad;
  static constexpr std::size_t kScores = kRowsFullTile * kLdFullTile; ///< of a head

  std::size_t dim() const { return static_cast<std::size_t>(head_dim_); }

  int num_heads_;
  int head_dim_;
  Memory q_;
  Memory keys_;
  Memory scores_;
};

/// Full tiles of scores, row by row, one tile for each kv head.
class ExpSum : public Subject {
public:
  explicit ExpSum(const Shape &shape)
      : num_rows_(std::int64_t{shape.num_kv_heads} * kRowsFullTile),
        logits_(random_rows(Format::f32, num_rows_, kKeysFullTile, 15)), x_(logits_.size()),
        sums_(static_cast<std::size_t>(num_rows_) * sizeof(float)) {}
  void reset() override { std::memcpy(x_.as<char>(), logits_.as<char>(), x_.size()); }
  void run(const Context &context) override {
    parallel_for(num_rows_ / kRowsFullTile, context.threads, [&](std::int64_t unit) {
      for (std::int64_t row = unit * kRowsFullTile; row < (unit + 1) * kRowsFullTile; ++row) {
        // Above all logits: they are sums of four numbers of at most sqrt(3) / 2.
        sums_.as<float>()[row] =
            context.kernels->exp_sum(x_.as<float>() + row * kKeysFullTile, kKeysFullTile, 4.0f);
      }
    });
  }
  float result() const override {
    return sum_of(sums_.as<float>(), static_cast<std::size_t>(num_rows_));
  }

private:
  std::int64_t num_rows_;
  Memory logits_;
  Memory x_;
  Memory sums_;
};

void add_products(const Options &options, const Shape &shape, std::int64_t kv) {
  const std::string where = "/" + name_of(shape) + "/kv=" + std::to_string(kv);
  const int max_threads = *std::max_element(options.threads.begin(), options.threads.end());
  const double ops = 2.0 * shape.num_qo_heads * shape.head_dim * static_cast<double>(kv);
  const auto work = [&](Format type) { return Work{kv_bytes(shape, kv, type) / 2, ops}; };
  const Format types[] = {Format::f32, Format::f16, Format::q4_0};
  for (const Format type : types) {
    add_benchmarks(options, std::string("kernel/qk_") + format_name(type) + where, work(type),
                   [=] { return std::make_unique<Qk>(shape, kv, max_threads, type); });
  }
  add_benchmarks(options, "kernel/qk_tiles" + where, work(Format::q4_0),
                 [=] { return std::make_unique<QkTiles>(shape, kv, max_threads); });
  for (const Format type : types) {
    add_benchmarks(options, std::string("kernel/pv_") + format_name(type) + where, work(type),
                   [=] { return std::make_unique<Pv>(shape, kv, max_threads, type); });
  }
  add_benchmarks(options, "kernel/pv_tiles" + where, work(Format::q4_0),
                 [=] { return std::make_unique<PvTiles>(shape, kv, max_threads); });
}

void add_tiles(const Options &options, const Shape &shape) {
  const std::string where = "/" + name_of(shape) + "/tile=" + std::to_string(kRowsFullTile) + "x" +
                            std::to_string(kKeysFullTile);
  const std::size_t heads = static_cast<std::size_t>(shape.num_kv_heads);
  const std::size_t dim = static_cast<std::size_t>(shape.head_dim);
  Work product;
  product.bytes = heads * kKeysFullTile * dim * sizeof(float);
  product.ops = 2.0 * shape.num_kv_heads * kRowsFullTile * kKeysFullTile * shape.head_dim;
  add_benchmarks(options, "kernel/qk_transposed" + where, product,
                 [=] { return std::make_unique<QkTransposed>(shape); });
  const std::size_t scores = heads * kRowsFullTile * kKeysFullTile;
  Work sum;
  sum.bytes = scores * sizeof(float);
  sum.ops = static_cast<double>(scores);
  sum.resets = true;
  add_benchmarks(options, "kernel/exp_sum" + where, sum,
                 [=] { return std::make_unique<ExpSum>(shape); });
}

} // namespace

void add_kernel_benchmarks(const Options &options) {
  for (const Shape &shape : chosen(options.shapes, {{32, 8, 128}})) {
    for (const std::int64_t kv : chosen(options.kv, {512, 32768})) {
      add_products(options, shape, kv);
    }
    add_tiles(options, shape);
  }
}

} // namespace mixedkv::bench
