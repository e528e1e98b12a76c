// attend() on key segments made by hand, against a double loop in float64, with every instruction
// set that this machine can run: packed keys and values that start and end within a tile or lie
// scattered over many, rows beside packed ones, few and many query rows, windows, positions, masks.
// Cells that nobody may see hold NaN throughout, so that whatever leaks shows.
//
// Usage: test_attention [part of a check's name]

#include "checks.h"
#include "formats/token_tile.h"
#include "kernels/dispatch.h"
#include "mixedkv/attention.h"
#include "rows/row_plane.h"

using namespace mixedkv;
using namespace testing;

namespace {

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

/// Of a row of results, norm over norm: of what was added up where f32 alone rounds, and of the
/// result where kernels of Q4_0 keys and values round besides.
constexpr double kTolerance = 2e-6;
constexpr double kToleranceQ4 = 5e-4;
/// Query, key, weight and value are each rounded to bf16, by 2^-8 at most.
constexpr double kToleranceBf16 = 4.0 / 256;

// --- pools of cells ----------------------------------------------------------------------------

/// The keys (or values) of all heads in a pool of cells.
struct Pool {
  RowPlane plane;
  int heads, width;
  std::int64_t cells;
  std::vector<char> bytes;

  Pool(RowPlane::Kind kind, Format type, int row_width, int num_heads, std::int64_t num_cells)
      : plane(kind, type, row_width, num_heads, num_cells), heads(num_heads), width(row_width),
        cells(num_cells), bytes(plane.bytes()) {}
  void fill(std::int64_t cell, float x) {
    const std::vector<float> row(size(width), x);
    for (int h = 0; h < heads; ++h)
      plane.put(bytes.data(), h, cell, Format::f32, row.data());
  }
  void randomise(Random &random, std::int64_t cell, float magnitude = 1.0f) {
    std::vector<float> row(size(width));
    for (int h = 0; h < heads; ++h) {
      for (float &x : row)
        x = magnitude * normal(random);
      plane.put(bytes.data(), h, cell, Format::f32, row.data());
    }
  }
  std::vector<float> get(int head, std::int64_t cell) const {
    std::vector<float> row(size(width));
    plane.get(bytes.data(), head, cell, row.data());
    return row;
  }
};

/// Keys and values in cells of two pools, and the segment that says so.
struct Source {
  Pool k, v;
  std::vector<std::int32_t> index; ///< cells, ascending; empty: first_cell on
  std::vector<std::int32_t> pos;   ///< or empty: from pos_start on
  std::vector<std::int32_t> pages; ///< or cells lie in pages of page_size
  std::int64_t first_cell = 0, pos_start = 0, len = 0, page_size = 0;

  Source(Format k_type, Format v_type, int head_dim, int head_dim_v, int heads, std::int64_t cells)
      : k(RowPlane::Kind::keys, k_type, head_dim, heads, cells),
        v(RowPlane::Kind::values, v_type, head_dim_v, heads, cells) {
    for (std::int64_t cell = 0; cell < cells; ++cell) {
      k.fill(cell, kNan);
      v.fill(cell, kNan);
    }
  }
  std::int64_t cell(std::int64_t j) const {
    if (!pages.empty())
      return pages[size(j / page_size)] * page_size + j % page_size;
    return index.empty() ? first_cell + j : index[size(j)];
  }
  std::int64_t position(std::int64_t j) const { return pos.empty() ? pos_start + j : pos[size(j)]; }
  void randomise(Random &random) {
    for (std::int64_t j = 0; j < len; ++j) {
      k.randomise(random, cell(j));
      v.randomise(random, cell(j), std::ldexp(1.0f, between(random, -4, 1)));
    }
  }
  KeySegment segment() const {
    const auto base = [&](const Pool &pool) {
      // Rows are found from the first key's on, packed ones from cell 0 on.
      const std::int64_t from =
          pool.plane.layout() == Layout::tiles || !index.empty() ? 0 : first_cell;
      return pool.bytes.data() + from * pool.plane.stride();
    };
    KeySegment s;
    s.k = base(k);
    s.v = base(v);
    s.k_format = k.plane.type();
    s.v_format = v.plane.type();
    s.k_layout = k.plane.layout();
    s.v_layout = v.plane.layout();
    s.k_head_stride = k.plane.head_stride();
    s.v_head_stride = v.plane.head_stride();
    s.k_row_stride = k.plane.stride();
    s.v_row_stride = v.plane.stride();
    s.index = index.empty() ? nullptr : index.data();
    s.pos = pos.empty() ? nullptr : pos.data();
    s.pos_start = pos_start;
    s.first_cell = first_cell;
    s.len = len;
    if (!pages.empty()) {
      const auto page_stride = [&](const Pool &pool) {
        const bool tiles = pool.plane.layout() == Layout::tiles;
        return pool.plane.stride() * (tiles ? page_size / kTileTokens : page_size);
      };
      s.pages = pages.data();
      s.page_size = page_size;
      s.k_page_stride = page_stride(k);
      s.v_page_stride = page_stride(v);
    }
    return s;
  }
};

/// A run of cells from `first` on.
Source run_of_cells(Random &random, Format k_type, Format v_type, int dim, int dim_v, int heads,
                    std::int64_t first, std::int64_t len) {
  Source source(k_type, v_type, dim, dim_v, heads, (first + len + 40) / 16 * 16);
  source.first_cell = first;
  source.len = len;
  source.randomise(random);
  return source;
}

/// About one cell in `sparseness`, in stretches of up to `stretch`.
Source scattered_cells(Random &random, Format k_type, Format v_type, int dim, int dim_v, int heads,
                       std::int64_t len, int sparseness, int stretch) {
  std::vector<std::int32_t> cells;
  std::int32_t next = between(random, 0, 20);
  while (size(len) > cells.size()) {
    const int n = between(random, 1, stretch);
    for (int i = 0; i < n && size(len) > cells.size(); ++i)
      cells.push_back(next++);
    next += between(random, 0, 2 * (sparseness - 1) * n);
  }
  Source source(k_type, v_type, dim, dim_v, heads, (next + 32) / 16 * 16);
  source.index = cells;
  source.len = len;
  source.randomise(random);
  return source;
}

/// The keys and values of a run of cells, in pages here and there.
Source in_pages(Random &random, const Source &run, std::int64_t page_size) {
  const std::int64_t num_pages = (run.len + page_size - 1) / page_size;
  std::vector<std::int32_t> table;
  for (std::int64_t p = 0; p < num_pages + 3; ++p)
    table.push_back(static_cast<std::int32_t>(p));
  std::shuffle(table.begin(), table.end(), random);
  table.resize(size(num_pages));
  const std::int64_t cells = ((num_pages + 3) * page_size + 15) / 16 * 16;
  Source source(run.k.plane.type(), run.v.plane.type(), run.k.width, run.v.width, run.k.heads,
                cells);
  source.pages = table;
  source.page_size = page_size;
  source.pos = run.pos;
  source.pos_start = run.pos_start;
  source.len = run.len;
  const auto copy = [&](const Pool &from, Pool &to) {
    for (std::int64_t j = 0; j < run.len; ++j)
      for (int h = 0; h < from.heads; ++h)
        to.plane.copy(to.bytes.data(), h, source.cell(j), from.plane, from.bytes.data(),
                      run.cell(j));
  };
  copy(run.k, source.k);
  copy(run.v, source.v);
  return source;
}

// --- a call and what it should give ------------------------------------------------------------

ComputeType compute_type_of_checks = ComputeType::f32;

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
  ComputeType compute_type = compute_type_of_checks;
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

Result run(const Call &call, int num_threads) {
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
  params.compute_type = call.compute_type;
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
std::vector<Seen> seen_by(const Call &call, const std::vector<std::vector<float>> &k, int h,
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

double worst_error = 0;

void expect_result(const Call &call, const Result &result, const char *what) {
  const bool bf16 = call.compute_type == ComputeType::bf16;
  const double tolerance = bf16 ? kToleranceBf16 : call.uses_q4() ? kToleranceQ4 : kTolerance;
  const int group = call.num_qo_heads / call.num_kv_heads;
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
      const std::size_t row = size(h * call.num_queries + i);
      const float *got = result.out.data() + row * size(call.head_dim_v);
      if (seen.empty()) {
        for (int d = 0; d < call.head_dim_v; ++d)
          EXPECT(got[d] == 0.0f, "%s: head %d query %d sees nothing", what, h, static_cast<int>(i));
        EXPECT(result.lse[row] == -kInf, "%s: head %d query %d: lse", what, h, static_cast<int>(i));
        continue;
      }
      double m = -HUGE_VAL, s = 0;
      for (const Seen &one : seen)
        m = std::max(m, one.x);
      std::vector<double> want(size(call.head_dim_v), 0.0), magnitude = want;
      for (const Seen &one : seen) {
        const double weight = std::exp(one.x - m);
        s += weight;
        for (std::size_t d = 0; d < want.size(); ++d) {
          want[d] += weight * v[one.key][d];
          magnitude[d] += weight * std::fabs(v[one.key][d]);
        }
      }
      double error = 0, norm = 0;
      for (std::size_t d = 0; d < want.size(); ++d) {
        const double difference = got[d] - want[d] / s;
        const double of = (call.uses_q4() && !bf16 ? want[d] : magnitude[d]) / s;
        error += difference * difference;
        norm += of * of;
      }
      error = std::sqrt(error / norm);
      EXPECT(error <= tolerance, "%s: head %d query %d: off by %.3g of its size", what, h,
             static_cast<int>(i), error);
      if (call.uses_q4() && !bf16)
        worst_error = std::max(worst_error, error);
      const double lse = m + std::log(s);
      EXPECT(std::fabs(result.lse[row] - lse) <= tolerance * (1 + std::fabs(lse)),
             "%s: head %d query %d: lse %.9g, not %.9g", what, h, static_cast<int>(i),
             static_cast<double>(result.lse[row]), lse);
    }
  }
}

/// Runs a call, checks it, and that neither the number of threads nor repetition shows.
Result check_call(const Call &call, const char *what) {
  const Result result = run(call, 1);
  expect_result(call, result, what);
  for (int threads : {2, 5, 1})
    EXPECT(run(call, threads) == result, "%s: other bits with %d threads", what, threads);
  return result;
}

// --- checks ------------------------------------------------------------------------------------

constexpr Format kPacked = Format::q4_0; // planes hold Q4_0 packed

struct Types {
  Format k, v;
  const char *name;
};
const Types kTypes[] = {{kPacked, kPacked, "packed"},
                        {kPacked, Format::f16, "packed keys, f16 values"},
                        {Format::f16, kPacked, "f16 keys, packed values"},
                        {Format::f32, kPacked, "f32 keys, packed values"},
                        {kPacked, Format::f32, "packed keys, f32 values"},
                        {Format::f16, Format::f16, "f16"}};
/// Few rows go through kernels that unpack in registers, many through keys side by side.
const int kQueries[] = {1, 2, 3, 5, 8, 33, 70};

Call make_call(Random &random, const std::vector<const Source *> &sources, std::int64_t num_queries,
               int group = 1) {
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

void test_attend(const std::string &isa, ComputeType compute_type) {
  compute_type_of_checks = compute_type;
  for (const Types &types : kTypes) {
    const std::string name =
        isa + (compute_type == ComputeType::bf16 ? " attend in bf16, " : " attend, ") + types.name;
    check(name + ": runs that start and end within tiles", [&] {
      Random random(81);
      for (std::int64_t first : {0, 1, 7, 15, 16, 35})
        for (std::int64_t len : {1, 2, 15, 16, 17, 40, 129, 261}) {
          const int dim = between(random, 0, 1) ? 64 : 96;
          const Source source =
              run_of_cells(random, types.k, types.v, dim, 160 - dim, 1, first, len);
          const int num_queries = kQueries[between(random, 0, 5)];
          Call call = make_call(random, {&source}, num_queries, between(random, 1, 2));
          check_call(call, "all");
          call.causal = true;
          check_call(call, "causal");
        }
    });
    check(name + ": scattered cells", [&] {
      Random random(82);
      const struct {
        std::int64_t len;
        int sparseness, stretch;
      } shapes[] = {{1, 1, 1},  {5, 30, 1},   {17, 40, 1},  {18, 40, 1},  {30, 50, 1},
                    {60, 4, 3}, {270, 2, 40}, {300, 3, 10}, {257, 1, 64}, {40, 20, 2}};
      for (const auto &shape : shapes)
        for (int num_queries : {1, 4, 9, 33}) {
          Source source = scattered_cells(random, types.k, types.v, 32, 64, 1, shape.len,
                                          shape.sparseness, shape.stretch);
          Call call = make_call(random, {&source}, num_queries);
          check_call(call, "all");
          // Positions that have nothing to do with the order of cells.
          for (std::int64_t j = 0; j < source.len; ++j)
            source.pos.push_back(static_cast<std::int32_t>(j));
          std::shuffle(source.pos.begin(), source.pos.end(), random);
          call.causal = true;
          check_call(call, "causal");
          call.window_left = between(random, 0, static_cast<int>(shape.len));
          check_call(call, "window");
        }
    });
    check(name + ": query rows, heads and dims", [&] {
      Random random(83);
      for (int num_queries : kQueries)
        for (int dim : {32, 128, 256}) {
          const Source source =
              run_of_cells(random, types.k, types.v, dim, 32 * between(random, 1, 5), 2,
                           between(random, 0, 31), 50);
          check_call(make_call(random, {&source}, num_queries, num_queries % 3 + 1), "all");
        }
      const Source wide = run_of_cells(random, types.k, types.v, 512, 512, 1, 3, 300);
      for (int num_queries : {1, 8, 9, 32})
        check_call(make_call(random, {&wide}, num_queries), "512 dims");
    });
    check(name + ": windows, soft cap, slopes and masks", [&] {
      Random random(84);
      for (int num_queries : {1, 3, 8, 33}) {
        const Source run = run_of_cells(random, types.k, types.v, 64, 32, 1, 5, 290);
        const Source scattered = scattered_cells(random, types.k, types.v, 64, 32, 1, 150, 3, 5);
        for (const Source *source : {&run, &scattered}) {
          Call call = make_call(random, {source}, num_queries, 2);
          for (std::int64_t window : {0, 1, 15, 40, 200}) {
            Call windowed = call;
            windowed.window_left = window;
            windowed.causal = window % 2 == 0;
            check_call(windowed, "window");
            windowed.window_right = window / 2;
            check_call(windowed, "window on both sides");
            windowed.window_left = -1;
            windowed.causal = false;
            check_call(windowed, "window on the right");
          }
          Call capped = call;
          capped.soft_cap = 1.5f;
          capped.causal = true;
          capped.alibi_slopes = {0.25f, 0.01f};
          check_call(capped, "soft cap and slopes");
          const std::size_t entries = size(2 * num_queries * source->len);
          Call masked = call;
          masked.mask_type = MaskType::boolean;
          for (std::size_t i = 0; i < entries; ++i)
            masked.boolean_mask.push_back(random() % 3 != 0);
          std::fill_n(masked.boolean_mask.begin(), source->len, 0); // the first row sees nothing
          check_call(masked, "boolean mask");
          masked.causal = true;
          check_call(masked, "boolean mask and causal");
          masked.alibi_slopes = {0.25f, 0.01f};
          check_call(masked, "boolean mask and slopes");
          Call biased = call;
          biased.mask_type = MaskType::f32;
          for (std::size_t i = 0; i < entries; ++i)
            biased.float_mask.push_back(random() % 3 == 0 ? -kInf : normal(random));
          check_call(biased, "f32 mask");
        }
      }
    });
    check(name + ": pages give the bits of keys that lie side by side", [&] {
      Random random(88);
      const bool packed = types.k == kPacked || types.v == kPacked;
      for (int num_queries : {1, 3, 9, 40})
        for (std::int64_t page_size : {1, 3, 16, 17, 64, 272}) {
          if (packed && page_size % kTileTokens != 0)
            continue;
          const std::int64_t len = between(random, 1, 900);
          Source run_of_keys = run_of_cells(random, types.k, types.v, 64, 96, 2, 0, len);
          Source paged = in_pages(random, run_of_keys, page_size);
          Call call = make_call(random, {&run_of_keys}, num_queries, 2);
          const auto expect_same = [&](const char *what) {
            call.sources = {&run_of_keys};
            const Result want = run(call, 2);
            call.sources = {&paged};
            for (int threads : {1, 3})
              EXPECT(run(call, threads) == want, "%s: %d keys in pages of %d, %d queries", what,
                     static_cast<int>(len), static_cast<int>(page_size), num_queries);
          };
          expect_same("all");
          call.causal = true;
          expect_same("causal");
          call.window_left = between(random, 0, static_cast<int>(len));
          expect_same("window");
          for (Source *source : {&run_of_keys, &paged}) {
            for (std::int64_t j = len; j-- > 0;)
              source->pos.push_back(static_cast<std::int32_t>(j));
          }
          expect_same("positions in disorder");
        }
    });
    check(name + ": several segments", [&] {
      Random random(85);
      for (int num_queries : {1, 4, 33, 70}) {
        Source cold = scattered_cells(random, types.k, types.v, 64, 64, 2, 310, 2, 9);
        Source hot = run_of_cells(random, Format::f16, Format::f16, 64, 64, 2, 0, 70);
        Source other = run_of_cells(random, types.v == Format::f16 ? kPacked : types.v, types.k, 64,
                                    64, 2, 29, 41);
        Source empty(types.k, types.v, 64, 64, 2, 16);
        std::int32_t next = 0;
        for (Source *source : {&other, &cold, &hot}) {
          source->pos.clear();
          for (std::int64_t j = 0; j < source->len; ++j)
            source->pos.push_back(next++);
        }
        Call call = make_call(random, {&cold, &empty, &hot, &other}, num_queries);
        check_call(call, "all");
        call.causal = true;
        check_call(call, "causal");
        call.window_left = 90;
        for (int i = 0; i < num_queries; ++i)
          call.q_pos.push_back(between(random, 0, static_cast<int>(call.num_keys())));
        check_call(call, "window, queries anywhere");
      }
    });
    check(name + ": cells that are not seen have no say in a bit", [&] {
      Random random(86);
      for (int num_queries : {1, 4, 8, 33})
        for (int step = 0; step < 4; ++step) {
          Source source = step % 2
                              ? run_of_cells(random, types.k, types.v, 64, 64, 1, 13, 150)
                              : scattered_cells(random, types.k, types.v, 64, 64, 1, 150, 2, 4);
          Call call = make_call(random, {&source}, num_queries);
          // Some keys are hidden from all queries, by a mask or for being later than they are.
          std::vector<bool> hidden(size(source.len), false);
          if (step < 2) {
            call.mask_type = MaskType::boolean;
            for (std::int64_t j = 0; j < source.len; ++j)
              hidden[size(j)] = random() % 3 == 0;
            for (int row = 0; row < num_queries; ++row)
              for (std::int64_t j = 0; j < source.len; ++j)
                call.boolean_mask.push_back(!hidden[size(j)]);
          } else {
            call.causal = true;
            std::vector<std::int32_t> positions;
            for (std::int64_t j = 0; j < source.len; ++j)
              source.pos.push_back(static_cast<std::int32_t>(j));
            std::shuffle(source.pos.begin(), source.pos.end(), random);
            call.q_pos.assign(size(num_queries), 80);
            for (std::int64_t j = 0; j < source.len; ++j)
              hidden[size(j)] = source.pos[size(j)] > 80;
          }
          const Result with_nan_around = check_call(call, "NaN around");
          std::vector<bool> in_use(size(source.k.cells), false);
          for (std::int64_t j = 0; j < source.len; ++j)
            in_use[size(source.cell(j))] = !hidden[size(j)];
          for (int content = 0; content < 4; ++content) {
            for (std::int64_t cell = 0; cell < source.k.cells; ++cell)
              if (!in_use[size(cell)]) {
                if (content == 0) {
                  source.k.randomise(random, cell, 10.0f);
                  source.v.randomise(random, cell, 100.0f);
                } else {
                  const float x = content == 1 ? 0.0f : content == 2 ? 6e4f : kNan;
                  source.k.fill(cell, x);
                  source.v.fill(cell, x);
                }
              }
            EXPECT(run(call, 2) == with_nan_around, "%d queries, step %d, content %d", num_queries,
                   step, content);
          }
        }
    });
    check(name + ": NaN reaches the queries that see it and no other", [&] {
      Random random(87);
      for (int num_queries : {4, 8, 33})
        for (bool in_key : {false, true})
          for (bool scattered : {false, true}) {
            Source source = scattered
                                ? scattered_cells(random, types.k, types.v, 64, 64, 1, 100, 2, 6)
                                : run_of_cells(random, types.k, types.v, 64, 64, 1, 13, 100);
            Call call = make_call(random, {&source}, num_queries);
            call.causal = true;
            const Result finite = check_call(call, "finite");
            const std::int64_t bad = source.len - 2; // seen by the last two queries
            (in_key ? source.k : source.v).fill(source.cell(bad), kNan);
            const Result result = run(call, 2);
            for (int i = 0; i < num_queries; ++i)
              for (int d = 0; d < 64; ++d) {
                const float x = result.out[size(i * 64 + d)];
                if (i < num_queries - 2)
                  EXPECT(bits_of(x) == bits_of(finite.out[size(i * 64 + d)]),
                         "%d queries: bits of query %d", num_queries, i);
                else
                  EXPECT(std::isnan(x), "%d queries: query %d is %g", num_queries, i,
                         static_cast<double>(x));
              }
          }
    });
  }
}

/// Where there is nothing in bf16 to be had, and in a decode step, asking for it changes no bit.
void test_f32_instead(const std::string &isa, bool has_bf16) {
  compute_type_of_checks = ComputeType::f32;
  check(isa + " bf16 leaves decode steps, and who has none, in f32", [&] {
    Random random(91);
    for (const Types &types : kTypes)
      for (int num_queries : {1, 9, 40}) {
        const Source source = run_of_cells(random, types.k, types.v, 64, 96, 2, 5, 300);
        Call call = make_call(random, {&source}, num_queries, 12);
        call.causal = true;
        const Result want = run(call, 2);
        call.compute_type = ComputeType::bf16;
        EXPECT((run(call, 2) == want) == (!has_bf16 || num_queries == 1), "%s, %d queries",
               types.name, num_queries);
      }
  });
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  for (const std::string &isa : available_isas()) {
    select_isa(isa);
    worst_error = 0;
    test_attend(isa, ComputeType::f32);
    std::printf("     largest relative error where Q4_0 takes part: %.2g\n", worst_error);
    const bool has_bf16 = active_kernels().bf16 != nullptr;
    if (has_bf16)
      test_attend(isa, ComputeType::bf16);
    test_f32_instead(isa, has_bf16);
  }
  return summary();
}
