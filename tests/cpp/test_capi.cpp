// The C interface: results against a double loop in float64 and against the C++ interface bit for
// bit, formats, threads, instruction sets. It includes public headers alone; versions are
// test_capi_versions.cpp's, what is refused test_capi_refusals.cpp's.
//
// Usage: test_capi [part of a check's name]

#include "capi_call.h"
#include "mixedkv/attention.h"
#include "mixedkv/convert.h"
#include "mixedkv/runtime.h"

using namespace testing;

namespace {

/// Of the f32 path on values of about 1, in sums of 90.
constexpr double kTolerance = 1e-5;

/// out and lse of f32 keys by definition.
void reference(const Call &call, bool causal, std::int64_t window, std::int64_t right, bool mask,
               bool sinks, bool alibi, float cap, std::vector<double> &out,
               std::vector<double> &lse) {
  out.assign(kHeads * kQueries * kDim, 0.0);
  lse.assign(kHeads * kQueries, -kInf);
  for (int h = 0; h < kHeads; ++h)
    for (int i = 0; i < kQueries; ++i) {
      const int g = h / (kHeads / kKvHeads), pos = kKeys - kQueries + i;
      double sum = sinks ? std::exp(static_cast<double>(call.sinks[h])) : 0;
      double *row = &out[static_cast<std::size_t>((h * kQueries + i) * kDim)];
      for (int j = 0; j < kKeys; ++j) {
        if ((causal && j > pos) || (window >= 0 && j < pos - window) ||
            (right >= 0 && j > pos + right))
          continue;
        double x = 0;
        for (int d = 0; d < kDim; ++d)
          x += static_cast<double>(call.q[(h * kQueries + i) * kDim + d]) *
               static_cast<double>(call.k[(g * kKeys + j) * kDim + d]);
        x /= 8; // sqrt(64)
        if (cap > 0)
          x = cap * std::tanh(x / cap);
        const double entry = mask ? call.mask_values[i * kKeys + j] : 0;
        x += mask ? (alibi ? 0.25 : 1.0) * entry : alibi ? 0.25 * (j - pos) : 0.0;
        const double weight = std::exp(x);
        sum += weight;
        for (int d = 0; d < kDim; ++d)
          row[d] += weight * static_cast<double>(call.v[(g * kKeys + j) * kDim + d]);
      }
      for (int d = 0; d < kDim; ++d)
        row[d] /= sum;
      lse[h * kQueries + i] = std::log(sum);
    }
}

void expect_near(const std::vector<float> &got, const std::vector<double> &want, const char *what) {
  for (std::size_t i = 0; i < got.size(); ++i)
    EXPECT(std::fabs(got[i] - want[i]) <= kTolerance * (1 + std::fabs(want[i])),
           "%s[%zu] %.9g, expected %.9g", what, i, static_cast<double>(got[i]), want[i]);
}

void test_results() {
  struct Options {
    const char *name;
    bool causal;
    std::int64_t window;
    bool mask, sinks, alibi;
    float cap;
    std::int64_t right = -1;
  };
  for (const Options &o : {Options{"plain", false, -1, false, false, false, 0},
                           Options{"causal", true, -1, false, false, false, 0},
                           Options{"window", true, 20, false, false, false, 0},
                           Options{"window 0", true, 0, false, false, false, 0},
                           Options{"mask", false, -1, true, false, false, 0},
                           Options{"sinks and cap", true, -1, false, true, false, 2},
                           Options{"alibi", true, -1, false, false, true, 0},
                           Options{"window right", false, -1, false, false, false, 0, 1},
                           Options{"window right 0", false, 4, false, false, false, 0, 0}}) {
    check(std::string("attend against float64, ") + o.name, [&] {
      Call call;
      call.params.flags = (o.causal ? MIXEDKV_CAUSAL : 0) |
                          (o.window >= 0 ? MIXEDKV_WINDOW_LEFT : 0) |
                          (o.right >= 0 ? MIXEDKV_WINDOW_RIGHT : 0);
      call.params.window_right = o.right >= 0 ? o.right : 0;
      call.params.window_left = o.window >= 0 ? o.window : 0;
      call.params.logits_soft_cap = o.cap;
      call.params.sinks = o.sinks ? call.sinks.data() : nullptr;
      call.params.alibi_slopes = o.alibi ? call.alibi.data() : nullptr;
      call.problem.mask = o.mask ? &call.mask : nullptr;
      call.expect_ok();
      std::vector<double> out, lse;
      reference(call, o.causal, o.window, o.right, o.mask, o.sinks, o.alibi, o.cap, out, lse);
      expect_near(call.out, out, "out");
      expect_near(call.lse, lse, "lse");
    });
  }

  check("attend has the C++ interface's bits, in every format", [] {
    for (mixedkv_format format = 0; format < mixedkv_format_count(); ++format) {
      Call call(format);
      call.params.flags = MIXEDKV_CAUSAL;
      call.expect_ok();
      std::vector<float> out(call.out.size()), lse(call.lse.size());
      mixedkv::KeySegment segments[2];
      for (int s = 0; s < 2; ++s) {
        const mixedkv_segment &from = call.segments[s];
        segments[s].k = from.k;
        segments[s].v = from.v;
        segments[s].k_format = static_cast<mixedkv::Format>(from.k_format);
        segments[s].k_head_stride = from.k_head_stride;
        segments[s].k_row_stride = from.k_row_stride;
        segments[s].v_head_stride = from.v_head_stride;
        segments[s].v_row_stride = from.v_row_stride;
        segments[s].pos_start = from.pos_start;
        segments[s].len = from.len;
      }
      mixedkv::AttentionProblem problem;
      problem.q.data = call.q.data();
      problem.q.head_stride = call.queries.head_stride;
      problem.q.row_stride = call.queries.row_stride;
      problem.q.pos_start = call.queries.pos_start;
      problem.q.len = kQueries;
      problem.segments = segments;
      problem.num_segments = 2;
      problem.out.data = out.data();
      problem.out.head_stride = kQueries * kDim;
      problem.out.row_stride = kDim;
      problem.out.lse = lse.data();
      problem.out.lse_head_stride = kQueries;
      problem.out.lse_row_stride = 1;
      mixedkv::AttentionParams params;
      params.num_qo_heads = kHeads;
      params.num_kv_heads = kKvHeads;
      params.head_dim = params.head_dim_v = kDim;
      params.sm_scale = 0.125f;
      params.causal = true;
      mixedkv::attend(&problem, 1, params);
      EXPECT(out == call.out && lse == call.lse, "format %d", static_cast<int>(format));
    }
  });

  check("a state carried from segment to segment, merged, and finalized", [] {
    Call whole, first, second;
    whole.expect_ok();
    const std::int64_t rows = kHeads * kQueries;
    for (Call *call : {&first, &second}) {
      call->problem.out = nullptr;
      call->problem.state = &call->state;
      call->problem.num_segments = 1;
      EXPECT(mixedkv_state_init(&call->state, rows) == MIXEDKV_OK, "%s", mixedkv_last_error());
    }
    first.expect_ok();
    second.problem.segments = &second.segments[1];
    second.expect_ok();
    EXPECT(mixedkv_merge(&first.state, &second.state, rows, kDim) == MIXEDKV_OK, "%s",
           mixedkv_last_error());
    EXPECT(mixedkv_finalize(&first.state, kHeads, kQueries, kDim, nullptr, &first.output) ==
               MIXEDKV_OK,
           "%s", mixedkv_last_error());
    // Continued instead of merged: the second segment onto the first one's state.
    Call carried;
    carried.problem.state = &carried.state;
    carried.problem.num_segments = 1;
    EXPECT(mixedkv_state_init(&carried.state, rows) == MIXEDKV_OK, "%s", mixedkv_last_error());
    carried.problem.out = nullptr;
    carried.expect_ok();
    carried.problem.segments = &carried.segments[1];
    carried.problem.out = &carried.output;
    carried.expect_ok();
    for (std::size_t i = 0; i < whole.out.size(); ++i) {
      EXPECT(std::fabs(whole.out[i] - first.out[i]) <= 1e-5f, "merged %zu", i);
      EXPECT(std::fabs(whole.out[i] - carried.out[i]) <= 1e-5f, "carried %zu", i);
    }
    // Normalised pairs of the parts.
    std::vector<float> outs, lses, out(whole.out.size()), lse(whole.lse.size());
    for (int s = 0; s < 2; ++s) {
      Call part;
      part.problem.segments = &part.segments[s];
      part.problem.num_segments = 1;
      part.expect_ok();
      outs.insert(outs.end(), part.out.begin(), part.out.end());
      lses.insert(lses.end(), part.lse.begin(), part.lse.end());
    }
    EXPECT(mixedkv_merge_states(outs.data(), lses.data(), 2, rows, kDim, out.data(), lse.data()) ==
               MIXEDKV_OK,
           "%s", mixedkv_last_error());
    for (std::size_t i = 0; i < out.size(); ++i)
      EXPECT(std::fabs(whole.out[i] - out[i]) <= 1e-5f, "pairs %zu", i);
  });

  check("no keys, no queries, no problems", [] {
    Call call;
    call.problem.segments = nullptr;
    call.problem.num_segments = 0;
    call.expect_ok();
    EXPECT(call.out == std::vector<float>(call.out.size(), 0.0f), "zeros");
    EXPECT(call.lse == std::vector<float>(call.lse.size(), -kInf), "-inf");
    call.queries.len = 0;
    call.queries.data = nullptr;
    call.expect_ok();
    EXPECT(mixedkv_attend(nullptr, 0, &call.params) == MIXEDKV_OK, "%s", mixedkv_last_error());
  });

  check("several problems, and rows by index", [] {
    Call one, two;
    one.expect_ok();
    const std::int32_t back[kQueries] = {2, 1, 0};
    two.queries.index = back; // the queries read and written in another order
    two.output.index = back;
    two.segments[0].index = two.index.data();
    const mixedkv_problem both[2] = {two.problem, two.problem};
    EXPECT(mixedkv_attend(both, 2, &two.params) == MIXEDKV_OK, "%s", mixedkv_last_error());
    EXPECT(one.out == two.out && one.lse == two.lse, "other bits");
  });
}

void test_pages() {
  check("keys in pages have the bits of keys side by side", [] {
    for (mixedkv_format format = 0; format < mixedkv_format_count(); ++format) {
      Call rows(format), paged(format);
      rows.problem.num_segments = paged.problem.num_segments = 1;
      rows.expect_ok();
      // The 64 keys in pages of 20, in an order of their own, the last one not full. A page holds
      // its rows of all heads.
      constexpr std::int32_t pages[] = {5, 0, 3, 2};
      constexpr std::ptrdiff_t v_row = kDim * sizeof(float);
      mixedkv_segment &s = paged.segments[0];
      const std::ptrdiff_t k_row = s.k_row_stride;
      std::vector<char> k(static_cast<std::size_t>(6 * 20 * kKvHeads * k_row), '\xff');
      std::vector<char> v(static_cast<std::size_t>(6 * 20 * kKvHeads * v_row), '\xff');
      for (int h = 0; h < kKvHeads; ++h)
        for (int j = 0; j < 64; ++j) {
          const int row = (pages[j / 20] * kKvHeads + h) * 20 + j % 20;
          std::memcpy(&k[static_cast<std::size_t>(row * k_row)],
                      static_cast<const char *>(s.k) + h * s.k_head_stride + j * k_row,
                      static_cast<std::size_t>(k_row));
          std::memcpy(&v[static_cast<std::size_t>(row * v_row)],
                      static_cast<const char *>(s.v) + h * s.v_head_stride + j * v_row, v_row);
        }
      s.k = k.data();
      s.v = v.data();
      s.k_head_stride = 20 * k_row;
      s.v_head_stride = 20 * v_row;
      s.pages = pages;
      s.page_size = 20;
      s.k_page_stride = kKvHeads * 20 * k_row;
      s.v_page_stride = kKvHeads * 20 * v_row;
      paged.expect_ok();
      EXPECT(rows.out == paged.out && rows.lse == paged.lse, "format %d", static_cast<int>(format));
    }
  });
}

// --- formats, threads, instruction sets ----------------------------------------------------------

void test_formats() {
  check("formats are those of the table, by number and by name", [] {
    EXPECT(mixedkv_format_count() == mixedkv::kNumFormats, "%d", mixedkv_format_count());
    for (mixedkv_format i = 0; i < mixedkv_format_count(); ++i) {
      mixedkv_format_info info = sized<mixedkv_format_info>();
      EXPECT(mixedkv_get_format_info(i, &info) == MIXEDKV_OK, "%s", mixedkv_last_error());
      const mixedkv::FormatInfo &want = mixedkv::kFormats[i];
      EXPECT(std::strcmp(info.name, want.name) == 0 && info.block_values == want.block_values &&
                 info.block_bytes == want.block_bytes && info.ggml_type == want.ggml_type &&
                 info.overflow == want.overflow,
             "format %d", i);
      mixedkv_format found = -1;
      EXPECT(mixedkv_format_by_name(info.name, &found) == MIXEDKV_OK && found == i, "%s",
             info.name);
      std::size_t bytes = 0;
      EXPECT(mixedkv_row_bytes(i, 64, &bytes) == MIXEDKV_OK &&
                 bytes == mixedkv::row_bytes(static_cast<mixedkv::Format>(i), 64),
             "%zu bytes of %s", bytes, info.name);
      EXPECT(bytes % static_cast<std::size_t>(info.alignment) == 0, "%d", info.alignment);
    }
  });
  check("scales are fitted on request, as convert_rows does it", [] {
    std::vector<float> x(96);
    for (std::size_t i = 0; i < x.size(); ++i)
      x[i] = static_cast<float>(i * 37 % 64) - 29.5f;
    for (const mixedkv::Format format : {mixedkv::Format::q4_0, mixedkv::Format::iq4_nl}) {
      std::vector<std::uint16_t> plain(27), fitted(27), want(27);
      for (std::uint32_t flags : {0u, MIXEDKV_FIT_SCALES})
        EXPECT(mixedkv_convert_rows(MIXEDKV_F32, x.data(), 384, static_cast<mixedkv_format>(format),
                                    (flags ? fitted : plain).data(), 54, 1, 96, flags,
                                    1) == MIXEDKV_OK,
               "%s", mixedkv_last_error());
      mixedkv::convert_row(mixedkv::Format::f32, x.data(), format, want.data(), 96, true);
      EXPECT(fitted == want && fitted != plain, "%s", format_name(format));
    }
  });
}

void test_machine() {
  constexpr mixedkv_status kBad = MIXEDKV_INVALID_ARGUMENT;
  check("threads", [&] {
    std::int32_t before = 0, n = 0;
    EXPECT(mixedkv_get_num_threads(&before) == MIXEDKV_OK && before >= 1, "%d", before);
    EXPECT(mixedkv_set_num_threads(3) == MIXEDKV_OK, "%s", mixedkv_last_error());
    EXPECT(mixedkv_get_num_threads(&n) == MIXEDKV_OK && n == 3, "%d", n);
    expect_refused("num_threads must be from 1 to 1024, got 0", mixedkv_set_num_threads(0), kBad);
    expect_refused("num_threads must not be null", mixedkv_get_num_threads(nullptr), kBad);
    EXPECT(mixedkv_set_num_threads(before) == MIXEDKV_OK, "%s", mixedkv_last_error());
  });
  check("instruction sets", [&] {
    const std::vector<mixedkv::IsaInfo> isas = mixedkv::compiled_isas();
    EXPECT(mixedkv_isa_count() == static_cast<std::int32_t>(isas.size()), "%d",
           mixedkv_isa_count());
    const char *before = nullptr, *now = nullptr;
    EXPECT(mixedkv_active_isa(&before) == MIXEDKV_OK, "%s", mixedkv_last_error());
    for (std::int32_t i = 0; i < mixedkv_isa_count(); ++i) {
      mixedkv_isa_info info = sized<mixedkv_isa_info>();
      EXPECT(mixedkv_get_isa_info(i, &info) == MIXEDKV_OK, "%s", mixedkv_last_error());
      EXPECT(std::strcmp(info.name, isas[static_cast<std::size_t>(i)].name) == 0, "%s", info.name);
      EXPECT(mixedkv_select_isa(info.name) == (info.available ? MIXEDKV_OK : kBad), "%s",
             info.name);
      if (info.available)
        EXPECT(mixedkv_active_isa(&now) == MIXEDKV_OK && std::strcmp(now, info.name) == 0, "%s",
               now);
    }
    mixedkv_isa_info info = sized<mixedkv_isa_info>();
    expect_refused("i must be from 0", mixedkv_get_isa_info(mixedkv_isa_count(), &info), kBad);
    expect_refused("info must not be null", mixedkv_get_isa_info(0, nullptr), kBad);
    expect_refused("unknown ISA 'mmx'", mixedkv_select_isa("mmx"), kBad);
    expect_refused("name must not be null", mixedkv_select_isa(nullptr), kBad);
    expect_refused("name must not be null", mixedkv_active_isa(nullptr), kBad);
    EXPECT(mixedkv_select_isa(before) == MIXEDKV_OK, "%s", mixedkv_last_error());
  });
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  test_results();
  test_pages();
  test_formats();
  test_machine();
  return summary();
}
