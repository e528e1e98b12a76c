// Conversions of whole arrays, and the move of a batch of tokens from hot to cold.
#include "filled_cache.h"
#include "mixedkv/convert.h"
#include "registry.h"
#include "runtime/parallel.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace mixedkv::bench {
namespace {

class Conversion : public Subject {
public:
  Conversion(Format from, Format to, std::int64_t num_rows, std::size_t n)
      : from_(from), to_(to), num_rows_(num_rows), n_(n), x_(random_rows(from, num_rows, n, 6)),
        y_(row_bytes(to, n) * static_cast<std::size_t>(num_rows)) {}
  void run(const Context &context) override {
    convert_rows({x_.as<char>(), from_, stride(from_)}, {y_.as<char>(), to_, stride(to_)},
                 num_rows_, n_, context.threads);
  }
  float result() const override {
    std::vector<float> row(n_);
    convert_row(to_, y_.as<char>(), Format::f32, row.data(), n_);
    return sum_of(row.data(), n_);
  }

private:
  std::ptrdiff_t stride(Format type) const {
    return static_cast<std::ptrdiff_t>(row_bytes(type, n_));
  }

  Format from_;
  Format to_;
  std::int64_t num_rows_;
  std::size_t n_;
  Memory x_;
  Memory y_;
};

/// What conversions are measured against: the same bytes, copied.
class Copy : public Subject {
public:
  Copy(std::int64_t num_rows, std::size_t n)
      : x_(random_rows(Format::f32, num_rows, n, 7)), y_(x_.size()) {}
  void run(const Context &context) override {
    constexpr std::size_t kPiece = std::size_t{64} << 10;
    const auto copy = [&](std::size_t begin, std::size_t bytes) {
      std::memcpy(y_.as<char>() + begin, x_.as<char>() + begin, bytes);
    };
    if (context.threads == 1) {
      copy(0, x_.size());
      return;
    }
    const std::int64_t pieces = static_cast<std::int64_t>((x_.size() + kPiece - 1) / kPiece);
    parallel_for(pieces, context.threads, [&](std::int64_t unit) {
      const std::size_t begin = static_cast<std::size_t>(unit) * kPiece;
      copy(begin, std::min(kPiece, x_.size() - begin));
    });
  }
  float result() const override { return *y_.as<float>(); }

private:
  Memory x_;
  Memory y_;
};

/// The commit of a token that makes hot exceed its level, so that a batch moves.
class Move : public Subject {
public:
  static constexpr std::int64_t kBatch = 256;
  static constexpr std::int64_t kHot = 1024;

  Move(const Shape &shape, Format cold, bool fit_scales) : cache_(shape, fill(cold, fit_scales)) {}

  void reset() override {
    if (moved_) {
      // What moved goes, and as many take its place in hot.
      cache_.get().seq_rm(0, oldest_, oldest_ + kBatch);
      oldest_ += kBatch;
      cache_.append(kBatch - 1);
      moved_ = false;
    }
    if (!cache_.get().has_slot()) {
      cache_.store_next(1);
    }
  }
  void run(const Context &) override {
    cache_.get().commit();
    moved_ = true;
  }
  float result() const override {
    const CacheStats stats = cache_.stats();
    if (moved_ && stats.cold_tokens != kBatch) {
      throw std::logic_error("the cache did not move the tokens that the benchmark times");
    }
    return static_cast<float>(stats.cold_tokens);
  }

private:
  static Fill fill(Format cold, bool fit_scales) {
    Fill fill;
    fill.cold_type = cold;
    fill.fit_scales = fit_scales;
    fill.hot = kHot;
    fill.cold_size = kBatch;
    fill.group_size = kBatch;
    return fill;
  }

  FilledCache cache_;
  std::int64_t oldest_ = 0;
  bool moved_ = false;
};

void add_conversions(const Options &options, const Shape &shape, std::int64_t kv) {
  const std::string where = "/" + name_of(shape) + "/kv=" + std::to_string(kv);
  const std::size_t n = static_cast<std::size_t>(shape.head_dim);
  const std::int64_t num_rows = kv * shape.num_kv_heads;
  const double values = static_cast<double>(num_rows) * shape.head_dim;
  const auto bytes = [&](Format type) {
    return row_bytes(type, n) * static_cast<std::size_t>(num_rows);
  };
  const std::pair<Format, Format> pairs[] = {
      {Format::f32, Format::q4_0}, {Format::f16, Format::q4_0}, {Format::q4_0, Format::f32},
      {Format::q4_0, Format::f16}, {Format::f32, Format::f16},  {Format::f16, Format::f32}};
  for (const auto &[source, target] : pairs) {
    const Format from = source;
    const Format to = target;
    add_benchmarks(options,
                   std::string("convert/") + format_name(from) + "_to_" + format_name(to) + where,
                   {std::max(bytes(from), bytes(to)), values},
                   [=] { return std::make_unique<Conversion>(from, to, num_rows, n); });
  }
  add_foreign_benchmarks(options, "convert/memcpy_of_f32" + where, {bytes(Format::f32), values},
                         [=] { return std::make_unique<Copy>(num_rows, n); });
}

void add_move(const Options &options, const Shape &shape) {
  Work work;
  work.bytes = kv_bytes(shape, Move::kBatch, Format::f16);
  work.ops = 2.0 * Move::kBatch * shape.num_kv_heads * shape.head_dim;
  work.resets = true;
  for (const Format cold : {Format::q4_0, Format::iq4_nl}) {
    for (const bool fit_scales : {false, true}) {
      add_benchmarks(options,
                     std::string("move/hot_f16_to_cold_") + format_name(cold) +
                         (fit_scales ? "_fitted/" : "/") + name_of(shape) +
                         "/tokens=" + std::to_string(Move::kBatch),
                     work, [=] { return std::make_unique<Move>(shape, cold, fit_scales); });
    }
  }
}

} // namespace

void add_conversion_benchmarks(const Options &options) {
  for (const Shape &shape : chosen(options.shapes, {{32, 8, 128}})) {
    for (const std::int64_t kv : chosen(options.kv, {256, 16384})) {
      add_conversions(options, shape, kv);
    }
    add_move(options, shape);
  }
}

} // namespace mixedkv::bench
