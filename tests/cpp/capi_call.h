// A call of the C interface that is right in every part, for tests to spoil one at a time.
#pragma once

#include "checks.h"
#include "mixedkv/c.h"

namespace testing {

constexpr int kHeads = 6, kKvHeads = 2, kDim = 64, kQueries = 3, kKeys = 90;
/// A structure of zeros that says its size.
template <typename T> T sized() {
  T structure;
  std::memset(&structure, 0, sizeof structure);
  structure.struct_size = sizeof structure;
  return structure;
}

inline std::vector<float> normals(Random &random, std::size_t n) {
  std::vector<float> values(n);
  for (float &x : values)
    x = normal(random);
  return values;
}

/// A call whose every part is right; tests spoil one at a time. Queries [heads, len], keys in two
/// segments: the first 64 keys as k_format rows, the rest as f32.
struct Call {
  std::vector<float> q, k, v;
  std::vector<char> k_rows; ///< the first segment's keys, in k_format
  std::vector<float> mask_values, ms, acc, out, lse, alibi, sinks;
  std::vector<std::int32_t> index;
  mixedkv_queries queries = sized<mixedkv_queries>();
  mixedkv_segment segments[2] = {sized<mixedkv_segment>(), sized<mixedkv_segment>()};
  mixedkv_mask mask = sized<mixedkv_mask>();
  mixedkv_state state = sized<mixedkv_state>();
  mixedkv_output output = sized<mixedkv_output>();
  mixedkv_problem problem = sized<mixedkv_problem>();
  mixedkv_params params = sized<mixedkv_params>();

  explicit Call(mixedkv_format k_format = MIXEDKV_F32) {
    constexpr std::ptrdiff_t row = kDim * sizeof(float);
    Random random(7);
    q = normals(random, kHeads * kQueries * kDim);
    k = normals(random, kKvHeads * kKeys * kDim);
    v = normals(random, kKvHeads * kKeys * kDim);
    std::size_t k_row = 0;
    EXPECT(mixedkv_row_bytes(k_format, kDim, &k_row) == MIXEDKV_OK, "%s", mixedkv_last_error());
    k_rows.resize(kKvHeads * kKeys * k_row);
    const auto k_stride = static_cast<std::ptrdiff_t>(k_row);
    EXPECT(mixedkv_convert_rows(MIXEDKV_F32, k.data(), row, k_format, k_rows.data(), k_stride,
                                kKvHeads * kKeys, kDim, 0, 1) == MIXEDKV_OK,
           "%s", mixedkv_last_error());
    mask_values = normals(random, kQueries * kKeys);
    for (std::size_t i = 0; i < mask_values.size(); i += 5)
      mask_values[i] = -kInf;
    ms.assign(2 * kHeads * kQueries, kNan);
    acc.assign(kHeads * kQueries * kDim, kNan);
    out.assign(kHeads * kQueries * kDim, kNan);
    lse.assign(kHeads * kQueries, kNan);
    alibi.assign(kHeads, 0.25f);
    sinks.assign(kHeads, 0.5f);
    for (int j = 0; j < 64; ++j)
      index.push_back(j);

    queries.data = q.data();
    queries.head_stride = kQueries * row;
    queries.row_stride = row;
    queries.len = kQueries;
    queries.pos_start = kKeys - kQueries;
    for (mixedkv_segment &s : segments) {
      s.k_row_stride = s.v_row_stride = row;
      s.k_head_stride = s.v_head_stride = kKeys * row;
    }
    segments[0].k = k_rows.data();
    segments[0].v = v.data();
    segments[0].k_format = k_format;
    segments[0].k_row_stride = k_stride;
    segments[0].k_head_stride = kKeys * k_stride;
    segments[0].len = 64;
    segments[1].k = k.data() + 64 * kDim;
    segments[1].v = v.data() + 64 * kDim;
    segments[1].pos_start = 64;
    segments[1].len = kKeys - 64;
    mask.data = mask_values.data();
    mask.query_stride = kKeys * sizeof(float);
    mask.key_stride = sizeof(float);
    state.ms = ms.data();
    state.acc = acc.data();
    output.data = out.data();
    output.head_stride = kQueries * kDim;
    output.row_stride = kDim;
    output.lse = lse.data();
    output.lse_head_stride = kQueries;
    output.lse_row_stride = 1;
    problem.q = &queries;
    problem.segments = segments;
    problem.num_segments = 2;
    problem.out = &output;
    params.num_qo_heads = kHeads;
    params.num_kv_heads = kKvHeads;
    params.head_dim = kDim;
  }
  Call(const Call &) = delete;

  mixedkv_status run() { return mixedkv_attend(&problem, 1, &params); }
  void expect_ok() {
    const mixedkv_status status = run();
    EXPECT(status == MIXEDKV_OK, "%s: %s", mixedkv_status_text(status), mixedkv_last_error());
  }
};

/// That a call ended with a status, and an error with text in it.
inline void expect_refused(const char *text, mixedkv_status got, mixedkv_status want) {
  EXPECT(got == want, "status %d for '%s'", static_cast<int>(got), text);
  EXPECT(std::strstr(mixedkv_last_error(), text) != nullptr, "'%s' lacks '%s'",
         mixedkv_last_error(), text);
}

} // namespace testing
