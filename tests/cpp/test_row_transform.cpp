// The seam of row transforms, with two that anyone can check: a flip of signs, which keeps all bits
// wherever a format treats both signs alike, and a turn of the order of dims, whose way back is
// another one than its way there.
#include "checks.h"

#include "mixedkv/attention.h"
#include "mixedkv/cache.h"

#include <algorithm>
#include <atomic>
#include <vector>

using namespace mixedkv;
using namespace testing;

namespace {

/// Every other sign.
struct Flip : RowTransform {
  void apply(float *row, std::size_t n) const noexcept override {
    for (std::size_t i = 1; i < n; i += 2)
      row[i] = -row[i];
  }
  void undo(float *row, std::size_t n) const noexcept override { apply(row, n); }
};

/// The first dims go to the end.
struct Turn : RowTransform {
  static constexpr std::ptrdiff_t kDims = 5;
  void apply(float *row, std::size_t n) const noexcept override {
    std::rotate(row, row + kDims, row + n);
  }
  void undo(float *row, std::size_t n) const noexcept override {
    std::rotate(row, row + n - kDims, row + n);
  }
};

/// Every other sign, and how often.
struct CountedFlip : Flip {
  mutable std::atomic<int> count{0};
  void apply(float *row, std::size_t n) const noexcept override {
    ++count;
    Flip::apply(row, n);
  }
};

constexpr int kHeads = 2, kQueryHeads = 6, kDim = 64, kDimV = 96, kLayers = 2;

CacheConfig config_of(Format hot, Format cold) {
  CacheConfig config;
  config.num_layers = kLayers;
  config.num_kv_heads = kHeads;
  config.head_dim = kDim;
  config.head_dim_v = kDimV;
  config.hot_size = 32;
  config.cold_size = 256;
  config.group_size = 16;
  config.n_pad = 16;
  config.hot_k_type = config.hot_v_type = hot;
  config.cold_k_type = config.cold_v_type = cold;
  return config;
}

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

struct Outcome {
  std::vector<float> out, keys, values;
  std::vector<char> stored; ///< keys of hot, as they are stored
};

std::vector<float> normals(Random &random, std::int64_t n) {
  std::vector<float> x(size(n));
  for (float &v : x)
    v = normal(random);
  return x;
}

RowsView rows_of(const std::vector<float> &x, std::int64_t n, int width) {
  return {x.data(), Format::f32, n * width * 4, width * 4};
}

/// The rows of both tiers as what they stand for are those that keys() and values() have.
void check_dequantised(const MixedCache &cache, const Outcome &outcome) {
  std::int64_t num_hot = 0, num_cold = 0;
  cache.export_len(0, num_hot, num_cold);
  const std::int64_t n = num_hot + num_cold;
  std::vector<std::int64_t> pos(size(n)), all(size(n));
  std::vector<float> hot_k(size(kHeads * num_hot * kDim)), cold_k(size(kHeads * num_cold * kDim));
  std::vector<float> hot_v(size(kHeads * num_hot * kDimV)), cold_v(size(kHeads * num_cold * kDimV));
  cache.export_dequantized(1, 0, {pos.data(), hot_k.data(), hot_v.data()},
                           {pos.data() + num_hot, cold_k.data(), cold_v.data()});
  cache.positions(0, all.data(), nullptr);
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t row = std::find(all.begin(), all.end(), pos[size(i)]) - all.begin();
    const bool cold = i >= num_hot;
    const std::int64_t own = cold ? i - num_hot : i, count = cold ? num_cold : num_hot;
    for (int head = 0; head < kHeads; ++head) {
      const float *k = (cold ? cold_k : hot_k).data() + (head * count + own) * kDim;
      const float *v = (cold ? cold_v : hot_v).data() + (head * count + own) * kDimV;
      EXPECT(std::equal(k, k + kDim, outcome.keys.data() + (head * n + row) * kDim), "keys");
      EXPECT(std::equal(v, v + kDimV, outcome.values.data() + (head * n + row) * kDimV), "values");
    }
  }
}

/// A prompt longer than hot, then decode steps that move tokens, one of them taken back.
Outcome run(const CacheConfig &config, const RowTransforms &transforms) {
  MixedCache cache(config, transforms);
  Random random(21);
  Outcome outcome;
  std::int64_t pos = 0;
  const auto step = [&](std::int64_t n, bool keep) {
    std::vector<std::int64_t> positions(size(n)), begin(size(n + 1)), ids(size(n), 0);
    for (std::int64_t i = 0; i < n; ++i) {
      positions[size(i)] = pos + i;
      begin[size(i + 1)] = i + 1;
    }
    EXPECT(cache.find_slot(positions.data(), {begin.data(), ids.data()}, n).has_value(), "room");
    for (int layer = 0; layer < kLayers; ++layer) {
      const std::vector<float> k = normals(random, kHeads * n * kDim);
      const std::vector<float> v = normals(random, kHeads * n * kDimV);
      const std::vector<float> q = normals(random, kQueryHeads * n * kDim);
      cache.store(layer, rows_of(k, n, kDim), rows_of(v, n, kDimV));
      std::vector<float> out(size(kQueryHeads * n * kDimV));
      QueryView queries;
      queries.data = q.data();
      queries.head_stride = n * kDim * 4;
      queries.row_stride = kDim * 4;
      queries.len = n;
      OutputView to;
      to.data = out.data();
      to.head_stride = n * kDimV;
      to.row_stride = kDimV;
      AttendOptions options;
      options.sm_scale = 0.3f;
      cache.attend(layer, queries, kQueryHeads, options, to);
      outcome.out.insert(outcome.out.end(), out.begin(), out.end());
    }
    if (keep) {
      cache.commit();
      pos += n;
    } else {
      cache.restore();
    }
  };
  step(70, true);
  for (int i = 0; i < 30; ++i)
    step(1 + i % 3, i % 4 != 3);
  const std::int64_t n = cache.seq_len(0);
  outcome.keys.resize(size(kHeads * n * kDim));
  outcome.values.resize(size(kHeads * n * kDimV));
  cache.keys(1, 0, outcome.keys.data());
  cache.values(1, 0, outcome.values.data());
  std::int64_t num_hot = 0, num_cold = 0;
  cache.export_len(0, num_hot, num_cold);
  EXPECT(num_hot > 0 && num_cold > 0, "both tiers are in use");
  const auto bytes = [&](Format format, std::int64_t rows, int width) {
    return std::vector<char>(size(kHeads * rows) * row_bytes(format, size(width)));
  };
  std::vector<std::int64_t> hot_pos(size(num_hot)), cold_pos(size(num_cold));
  outcome.stored = bytes(config.hot_k_type, num_hot, kDim);
  std::vector<char> hot_v = bytes(config.hot_v_type, num_hot, kDimV);
  std::vector<char> cold_k = bytes(config.cold_k_type, num_cold, kDim);
  std::vector<char> cold_v = bytes(config.cold_v_type, num_cold, kDimV);
  cache.export_rows(1, 0, {hot_pos.data(), outcome.stored.data(), hot_v.data()},
                    {cold_pos.data(), cold_k.data(), cold_v.data()});
  check_dequantised(cache, outcome);
  return outcome;
}

double relative_error(const std::vector<float> &got, const std::vector<float> &want) {
  double difference = 0.0, norm = 0.0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    difference += std::pow(double{got[i]} - double{want[i]}, 2);
    norm += std::pow(double{want[i]}, 2);
  }
  return std::sqrt(difference / norm);
}

void test_flip() {
  const auto flip = std::make_shared<const Flip>();
  for (const Format cold : {Format::f32, Format::f16})
    check(std::string("a flip of signs keeps all bits, cold ") + format_name(cold), [&] {
      const CacheConfig config = config_of(Format::f16, cold);
      const Outcome plain = run(config, {});
      const Outcome flipped = run(config, {flip, flip});
      // In rows of plain formats a sign changes nothing else, products and sums included.
      EXPECT(flipped.out == plain.out, "outputs");
      EXPECT(flipped.keys == plain.keys && flipped.values == plain.values, "keys and values");
      EXPECT(flipped.stored != plain.stored, "what is stored is changed");
      std::vector<char> expected = plain.stored;
      for (std::size_t i = 1; i < expected.size() / 2; i += 2)
        expected[2 * i + 1] = static_cast<char>(expected[2 * i + 1] ^ 0x80);
      EXPECT(flipped.stored == expected, "stored keys have every other sign flipped");
    });
  check("keys alone, values alone", [&] {
    const CacheConfig config = config_of(Format::f16, Format::f16);
    const Outcome plain = run(config, {});
    for (const RowTransforms &transforms : {RowTransforms{flip, nullptr}, {nullptr, flip}}) {
      const Outcome flipped = run(config, transforms);
      EXPECT(flipped.out == plain.out, "outputs");
      EXPECT(flipped.keys == plain.keys && flipped.values == plain.values, "keys and values");
    }
  });
}

void test_turn() {
  const auto turn = std::make_shared<const Turn>();
  for (const Format cold : {Format::f16, Format::q4_0})
    check(std::string("a turn of dims is undone, cold ") + format_name(cold), [&] {
      const CacheConfig config = config_of(Format::f16, cold);
      const Outcome plain = run(config, {});
      const Outcome turned = run(config, {turn, turn});
      // Blocks of Q4_0 hold other values together: other errors of quantisation, of 0.1 or so.
      const double limit = cold == Format::q4_0 ? 0.2 : 1e-5;
      EXPECT(relative_error(turned.out, plain.out) < limit, "outputs: %g",
             relative_error(turned.out, plain.out));
      EXPECT(relative_error(turned.keys, plain.keys) < limit, "keys");
      EXPECT(relative_error(turned.values, plain.values) < limit, "values");
      if (cold == Format::f16)
        EXPECT(turned.keys == plain.keys && turned.values == plain.values, "bits");
    });
}

/// Two sequences' queries in one call, each over so many keys of its own that these are cut into
/// pieces.
struct Batch {
  static constexpr int kSequences = 2, kQueries = 3, kKeys = 5000;
  std::vector<float> q, k, v;
  Batch() {
    Random random(31);
    q = normals(random, kSequences * kQueryHeads * kQueries * kDim);
    k = normals(random, kSequences * kHeads * kKeys * kDim);
    v = normals(random, kSequences * kHeads * kKeys * kDimV);
  }

  /// Sequences [first, end).
  std::vector<float> attend(int first, int end, const RowTransform *transform, int threads) const {
    std::vector<float> out(size((end - first) * kQueryHeads * kQueries * kDimV));
    std::vector<KeySegment> segments(size(end - first));
    std::vector<AttentionProblem> problems(size(end - first));
    for (int i = first; i < end; ++i) {
      KeySegment &segment = segments[size(i - first)];
      segment.k = k.data() + std::ptrdiff_t{i} * kHeads * kKeys * kDim;
      segment.v = v.data() + std::ptrdiff_t{i} * kHeads * kKeys * kDimV;
      segment.k_format = segment.v_format = Format::f32;
      segment.k_row_stride = kDim * 4;
      segment.v_row_stride = kDimV * 4;
      segment.k_head_stride = kKeys * segment.k_row_stride;
      segment.v_head_stride = kKeys * segment.v_row_stride;
      segment.len = kKeys;
      AttentionProblem &problem = problems[size(i - first)];
      problem.q.data = q.data() + std::ptrdiff_t{i} * kQueryHeads * kQueries * kDim;
      problem.q.head_stride = kQueries * kDim * 4;
      problem.q.row_stride = kDim * 4;
      problem.q.len = kQueries;
      problem.segments = &segment;
      problem.num_segments = 1;
      problem.out.data = out.data() + std::ptrdiff_t{i - first} * kQueryHeads * kQueries * kDimV;
      problem.out.head_stride = kQueries * kDimV;
      problem.out.row_stride = kDimV;
    }
    AttentionParams params;
    params.num_qo_heads = kQueryHeads;
    params.num_kv_heads = kHeads;
    params.head_dim = kDim;
    params.head_dim_v = kDimV;
    params.sm_scale = 0.1f;
    params.key_transform = transform;
    params.num_threads = threads;
    params.cut_alone = true;
    mixedkv::attend(problems.data(), end - first, params);
    return out;
  }
};

void test_pieces() {
  check("queries are changed once a worker, however their keys are cut", [] {
    const Batch batch;
    constexpr int rows = Batch::kSequences * kQueryHeads * Batch::kQueries;
    std::vector<float> apart, first;
    for (int i = 0; i < Batch::kSequences; ++i) {
      const std::vector<float> one = batch.attend(i, i + 1, nullptr, 1);
      apart.insert(apart.end(), one.begin(), one.end());
    }
    for (int threads : {1, 2, 3}) {
      EXPECT(batch.attend(0, Batch::kSequences, nullptr, threads) == apart, "sequences apart");
      const CountedFlip flip;
      const std::vector<float> out = batch.attend(0, Batch::kSequences, &flip, threads);
      // Keys are not flipped here: only that all threads see the same queries counts.
      if (threads == 1) {
        first = out;
        EXPECT(flip.count == rows, "%d rows are changed %d times", rows, flip.count.load());
      }
      EXPECT(out == first, "%d threads", threads);
    }
  });
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  test_flip();
  test_turn();
  test_pieces();
  return summary();
}
