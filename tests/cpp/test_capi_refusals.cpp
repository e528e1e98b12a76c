// The C interface: every argument wrong once, with the status and the text that names it, and
// nothing written.
//
// Usage: test_capi_refusals [part of a check's name]

#include "capi_call.h"

#include <functional>

using namespace testing;

namespace {

// --- wrong arguments -----------------------------------------------------------------------------

struct Fault {
  const char *text;
  std::function<void(Call &)> spoil;
  mixedkv_status status = MIXEDKV_INVALID_ARGUMENT;
};

template <typename T> T *off_by_one(T *pointer) {
  return reinterpret_cast<T *>(reinterpret_cast<std::uintptr_t>(pointer) + 1);
}

void test_faults() {
  static std::int32_t ascending[64], negative[kQueries] = {0, 1, -2};
  for (int j = 0; j < 64; ++j)
    ascending[j] = j;
  ascending[2] = 1;
  const Fault faults[] = {
      {"params must not be null", nullptr},
      {"params.struct_size must be the structure's size, at least",
       [](Call &c) { c.params.struct_size = 8; }},
      {"params.num_qo_heads must be from 1", [](Call &c) { c.params.num_qo_heads = 0; }},
      {"params.num_kv_heads must be from 1", [](Call &c) { c.params.num_kv_heads = -1; }},
      {"params.num_qo_heads must be a multiple of 4, got 6",
       [](Call &c) { c.params.num_kv_heads = 4; }},
      {"params.head_dim must be from 1 to 65536, got 0", [](Call &c) { c.params.head_dim = 0; }},
      {"params.head_dim_v must be from 0", [](Call &c) { c.params.head_dim_v = -3; }},
      {"params.flags has bits that this version does not know: 0x80",
       [](Call &c) { c.params.flags = 0x80; }, MIXEDKV_UNSUPPORTED},
      {"params.sm_scale must be finite, got inf", [](Call &c) { c.params.sm_scale = kInf; }},
      {"params.logits_soft_cap must be finite and not negative, got -1",
       [](Call &c) { c.params.logits_soft_cap = -1; }},
      {"params.logits_soft_cap must be finite", [](Call &c) { c.params.logits_soft_cap = kNan; }},
      {"params.logits_soft_cap must be 0 (none) or 1.17549435e-38 (2**-126) or more, got 9.99995e-41",
       [](Call &c) { c.params.logits_soft_cap = 1e-40f; }},
      {"params.compute_type must be from 0 to 2, got 3",
       [](Call &c) { c.params.compute_type = 3; }},
      {"params.window_right is -1, and params.flags lacks MIXEDKV_WINDOW_RIGHT",
       [](Call &c) { c.params.window_right = -1; }},
      {"params.window_right must be from 0 to 1099511627776, got 9223372036854775807",
       [](Call &c) {
         c.params.flags = MIXEDKV_WINDOW_RIGHT;
         c.params.window_right = INT64_MAX;
       }},
      {"problems[0].segments[1].k_layout must be zero for this version, got 1",
       [](Call &c) { c.segments[1].k_layout = 1; }, MIXEDKV_UNSUPPORTED},
      {"problems[0].segments[0].v_layout must be zero for this version, got -1",
       [](Call &c) { c.segments[0].v_layout = -1; }, MIXEDKV_UNSUPPORTED},
      {"params.window_left is 5, and params.flags lacks MIXEDKV_WINDOW_LEFT",
       [](Call &c) { c.params.window_left = 5; }},
      {"params.window_left must be from 0",
       [](Call &c) {
         c.params.flags = MIXEDKV_WINDOW_LEFT;
         c.params.window_left = -1;
       }},
      {"params.alibi_slopes must be aligned to 4",
       [](Call &c) { c.params.alibi_slopes = off_by_one(c.alibi.data()); }},
      {"params.sinks must be aligned to 4",
       [](Call &c) { c.params.sinks = off_by_one(c.sinks.data()); }},
      {"params.num_threads must be from 0 to 1024, got 1025",
       [](Call &c) { c.params.num_threads = 1025; }},
      {"params.reserved must be zero", [](Call &c) { c.params.reserved = 1; }, MIXEDKV_UNSUPPORTED},
      {"problems[0].struct_size", [](Call &c) { c.problem.struct_size = 0; }},
      {"problems[0].q must not be null", [](Call &c) { c.problem.q = nullptr; }},
      {"problems[0].num_segments must be from 0", [](Call &c) { c.problem.num_segments = -1; }},
      {"problems[0].segments must not be null", [](Call &c) { c.problem.segments = nullptr; }},
      {"problems[0] must have a state, or an out with data",
       [](Call &c) {
         c.problem.out = nullptr;
         c.problem.state = nullptr;
       }},
      {"problems[0].q.struct_size", [](Call &c) { c.queries.struct_size = 16; }},
      {"problems[0].q.format must be a format's number", [](Call &c) { c.queries.format = 99; }},
      {"problems[0].q.format must be MIXEDKV_F32 or MIXEDKV_F16, got 2 (q4_0)",
       [](Call &c) { c.queries.format = MIXEDKV_Q4_0; }},
      {"problems[0].q.len must be from 0", [](Call &c) { c.queries.len = -1; }},
      {"problems[0].q.data must not be null", [](Call &c) { c.queries.data = nullptr; }},
      {"problems[0].q.data must be aligned to 4 bytes",
       [](Call &c) { c.queries.data = off_by_one(c.q.data()); }},
      {"problems[0].q.head_stride must be a multiple of 4, got 6",
       [](Call &c) { c.queries.head_stride = 6; }},
      {"problems[0].q.row_stride must be a multiple of 4, got -3",
       [](Call &c) { c.queries.row_stride = -3; }},
      {"problems[0].q.index must count from 0, got -2 at 2",
       [](Call &c) { c.queries.index = negative; }},
      {"problems[0].q.pos must be aligned", [](Call &c) { c.queries.pos = off_by_one(negative); }},
      {"problems[0].q.pos_start must be from -2147483648 to 2147483644, got 2147483645",
       [](Call &c) { c.queries.pos_start = INT32_MAX - 2; }},
      {"problems[0].q.reserved must be zero", [](Call &c) { c.queries.reserved = 1; },
       MIXEDKV_UNSUPPORTED},
      {"problems[0].segments[0].struct_size", [](Call &c) { c.segments[0].struct_size = 1; }},
      {"problems[0].segments[1].struct_size must be",
       [](Call &c) { c.segments[1].struct_size += 8; }},
      {"problems[0].segments[1].k_format must be a format's number, from 0 to",
       [](Call &c) { c.segments[1].k_format = -1; }},
      {"problems[0].segments[1].v_format", [](Call &c) { c.segments[1].v_format = 1000; }},
      {"problems[0].segments[0].len must be from 0", [](Call &c) { c.segments[0].len = -5; }},
      {"problems[0].segments[0].k must not be null", [](Call &c) { c.segments[0].k = nullptr; }},
      {"problems[0].segments[1].v must not be null", [](Call &c) { c.segments[1].v = nullptr; }},
      {"problems[0].segments[1].v must be aligned to 2",
       [](Call &c) {
         c.segments[1].v_format = MIXEDKV_F16;
         c.segments[1].v = off_by_one(c.v.data());
       }},
      {"params.head_dim must be a multiple of 32 for q4_0, got 40",
       [](Call &c) {
         c.params.head_dim = 40;
         c.segments[0].k_format = MIXEDKV_Q4_0;
       }},
      {"params.head_dim_v must be a multiple of 32 for q4_0, got 33",
       [](Call &c) {
         c.params.head_dim_v = 33;
         c.segments[1].v_format = MIXEDKV_Q4_0;
       }},
      {"problems[0].segments[0].k_head_stride must be a multiple of 4",
       [](Call &c) { c.segments[0].k_head_stride = 2; }},
      {"problems[0].segments[0].k_row_stride", [](Call &c) { c.segments[0].k_row_stride = 1; }},
      {"problems[0].segments[1].v_head_stride", [](Call &c) { c.segments[1].v_head_stride = 1; }},
      {"problems[0].segments[1].v_row_stride", [](Call &c) { c.segments[1].v_row_stride = 1; }},
      {"problems[0].segments[0].index must ascend strictly from 0, got 1 at 2",
       [](Call &c) { c.segments[0].index = ascending; }},
      {"problems[0].segments[0].index must be null where there are pages",
       [](Call &c) {
         c.segments[0].index = c.index.data();
         c.segments[0].pages = c.index.data();
       }},
      {"problems[0].segments[0].page_size must be from 1",
       [](Call &c) { c.segments[0].pages = c.index.data(); }},
      {"problems[0].segments[0].pages must count from 0, got -2 at 2",
       [](Call &c) {
         c.segments[0].pages = negative;
         c.segments[0].page_size = 20;
       }},
      {"problems[0].segments[0].k_page_stride must be a multiple of 4, got 2",
       [](Call &c) {
         c.segments[0].pages = c.index.data();
         c.segments[0].page_size = 16;
         c.segments[0].k_page_stride = 2;
       }},
      {"problems[0].segments[0].v_page_stride must be a multiple of 4, got -1",
       [](Call &c) {
         c.segments[0].pages = c.index.data();
         c.segments[0].page_size = 16;
         c.segments[0].v_page_stride = -1;
       }},
      {"problems[0].segments[0].pos_start", [](Call &c) { c.segments[0].pos_start = INT64_MIN; }},
      {"problems[0].mask.struct_size", [](Call &c) { c.mask.struct_size = 1u << 30; }},
      {"problems[0].mask.type must be from 0 to 2, got 3", [](Call &c) { c.mask.type = 3; }},
      {"problems[0].mask.data must not be null", [](Call &c) { c.mask.data = nullptr; }},
      {"problems[0].mask.head_stride", [](Call &c) { c.mask.head_stride = 1; }},
      {"problems[0].mask.query_stride", [](Call &c) { c.mask.query_stride = 2; }},
      {"problems[0].mask.key_stride must be a multiple of 4, got 3",
       [](Call &c) { c.mask.key_stride = 3; }},
      {"problems[0].mask.reserved", [](Call &c) { c.mask.reserved = -1; }, MIXEDKV_UNSUPPORTED},
      {"problems[0].state.ms must not be null", [](Call &c) { c.state.ms = nullptr; }},
      {"problems[0].state.acc must not be null", [](Call &c) { c.state.acc = nullptr; }},
      {"problems[0].out.data must not be null", [](Call &c) { c.output.data = nullptr; }},
      {"problems[0].out.data must be aligned",
       [](Call &c) { c.output.data = off_by_one(c.out.data()); }},
      {"problems[0].out.row_stride must keep rows of 64 apart, got 63",
       [](Call &c) { c.output.row_stride = 63; }},
      {"problems[0].out.head_stride must keep rows of 64 apart, got -63",
       [](Call &c) { c.output.head_stride = -63; }},
      {"problems[0].out.lse_row_stride must keep rows of 1 apart, got 0",
       [](Call &c) { c.output.lse_row_stride = 0; }},
      {"problems[0].out.lse_head_stride", [](Call &c) { c.output.lse_head_stride = 0; }},
      {"problems[0].out.index must count from 0", [](Call &c) { c.output.index = negative; }},
  };
  check("attend refuses what is wrong, by name and value, before it writes", [&] {
    for (const Fault &fault : faults) {
      Call call;
      call.problem.mask = &call.mask;
      call.problem.state = &call.state;
      EXPECT(mixedkv_state_init(&call.state, kHeads * kQueries) == MIXEDKV_OK, "init");
      const std::vector<float> ms = call.ms;
      call.expect_ok();
      call.ms = ms;
      call.out.assign(call.out.size(), 7.0f);
      if (fault.spoil)
        fault.spoil(call);
      expect_refused(fault.text,
                     mixedkv_attend(&call.problem, 1, fault.spoil ? &call.params : nullptr),
                     fault.status);
      EXPECT(call.ms == ms && call.out == std::vector<float>(call.out.size(), 7.0f),
             "written to: %s", fault.text);
    }
    Call call;
    expect_refused("problems must not be null", mixedkv_attend(nullptr, 1, &call.params),
                   MIXEDKV_INVALID_ARGUMENT);
    expect_refused("num_problems must be from 0", mixedkv_attend(&call.problem, -1, &call.params),
                   MIXEDKV_INVALID_ARGUMENT);
  });

  check("the algebra of states refuses likewise", [] {
    constexpr mixedkv_status kBad = MIXEDKV_INVALID_ARGUMENT;
    Call c;
    const mixedkv_state *s = &c.state;
    float *x = c.out.data();
    expect_refused("state must not be null", mixedkv_state_init(nullptr, 1), kBad);
    expect_refused("num_rows must be from 0", mixedkv_state_init(s, -1), kBad);
    expect_refused("num_qo_heads must be", mixedkv_finalize(s, 0, 1, 1, nullptr, &c.output), kBad);
    expect_refused("len must be", mixedkv_finalize(s, 1, -1, 1, nullptr, &c.output), kBad);
    expect_refused("head_dim_v must be", mixedkv_finalize(s, 1, 1, 0, nullptr, &c.output), kBad);
    expect_refused("out must not be null", mixedkv_finalize(s, 1, 1, 1, nullptr, nullptr), kBad);
    expect_refused("sinks must be aligned", mixedkv_finalize(s, 1, 1, 1, off_by_one(x), &c.output),
                   kBad);
    expect_refused("state must not be null", mixedkv_finalize(nullptr, 1, 1, 1, nullptr, &c.output),
                   kBad);
    c.output.data = c.output.lse = nullptr;
    expect_refused("out.data must not be null", mixedkv_finalize(s, 1, 1, 1, nullptr, &c.output),
                   kBad);
    expect_refused("a must not be null", mixedkv_merge(nullptr, s, 1, 1), kBad);
    expect_refused("b must not be null", mixedkv_merge(s, nullptr, 1, 1), kBad);
    expect_refused("num_rows must be", mixedkv_merge(s, s, INT64_MAX, 64), kBad);
    expect_refused("head_dim_v must be", mixedkv_merge(s, s, 1, 1 << 20), kBad);
    expect_refused("num_states must be", mixedkv_merge_states(x, x, 0, 1, 1, x, x), kBad);
    expect_refused("outs must not be null", mixedkv_merge_states(nullptr, x, 1, 1, 1, x, x), kBad);
    expect_refused("lses must not be null", mixedkv_merge_states(x, nullptr, 1, 1, 1, x, x), kBad);
    expect_refused("out must not be null", mixedkv_merge_states(x, x, 1, 1, 1, nullptr, x), kBad);
    expect_refused("lse must be aligned", mixedkv_merge_states(x, x, 1, 1, 1, x, off_by_one(x)),
                   kBad);
  });
}

void test_formats() {
  constexpr mixedkv_status kBad = MIXEDKV_INVALID_ARGUMENT;
  check("conversion refuses what is wrong", [&] {
    std::vector<float> x(64, 1.0f);
    std::vector<std::uint16_t> y(64, 7); // 36 bytes and more
    const auto convert = [&](mixedkv_format from, mixedkv_format to, std::int64_t rows,
                             std::int64_t n, std::ptrdiff_t x_stride = 128,
                             std::ptrdiff_t y_stride = 18, std::uint32_t flags = 0,
                             std::int32_t threads = 0) {
      return mixedkv_convert_rows(from, x.data(), x_stride, to, y.data(), y_stride, rows, n, flags,
                                  threads);
    };
    EXPECT(convert(MIXEDKV_F32, MIXEDKV_Q4_0, 2, 32) == MIXEDKV_OK, "%s", mixedkv_last_error());
    y.assign(64, 7);
    expect_refused("from must be a format's number", convert(-1, 0, 1, 32), kBad);
    expect_refused("to must be a format's number", convert(0, 77, 1, 32), kBad);
    expect_refused("num_rows must be from 0", convert(0, MIXEDKV_Q4_0, -1, 32), kBad);
    expect_refused("n must be from 0", convert(0, MIXEDKV_Q4_0, 1, -32), kBad);
    expect_refused("n must be a multiple of 32 for q4_0, got 31", convert(0, MIXEDKV_Q4_0, 1, 31),
                   kBad);
    expect_refused("x_stride must be a multiple of 4, got 126",
                   convert(0, MIXEDKV_Q4_0, 2, 32, 126), kBad);
    expect_refused("y_stride must be a multiple of 2, got 19",
                   convert(0, MIXEDKV_Q4_0, 2, 32, 128, 19), kBad);
    expect_refused("y_stride must keep rows of 18 apart, got 16",
                   convert(0, MIXEDKV_Q4_0, 2, 32, 128, 16), kBad);
    expect_refused("flags has bits", convert(0, MIXEDKV_Q4_0, 2, 32, 128, 18, 4),
                   MIXEDKV_UNSUPPORTED);
    expect_refused("flags must be without MIXEDKV_FIT_SCALES where to is f16, whose",
                   convert(0, MIXEDKV_F16, 1, 32, 128, 64, MIXEDKV_FIT_SCALES), kBad);
    expect_refused("num_threads must be from 0", convert(0, MIXEDKV_Q4_0, 2, 32, 128, 18, 0, -1),
                   kBad);
    expect_refused("x must not be null",
                   mixedkv_convert_rows(0, nullptr, 128, 2, y.data(), 18, 1, 32, 0, 0), kBad);
    expect_refused("y must not be null",
                   mixedkv_convert_rows(0, x.data(), 128, 2, nullptr, 18, 1, 32, 0, 0), kBad);
    x[45] = -524160.0f;
    expect_refused("x must have magnitudes below 524160 for q4_0, got -524160 at value 13 of row 1",
                   convert(MIXEDKV_F32, MIXEDKV_Q4_0, 2, 32), kBad);
    expect_refused("x must have magnitudes below 65520 for f16, got -524160 at value 13 of row 1",
                   convert(MIXEDKV_F32, MIXEDKV_F16, 2, 32, 128, 64), kBad);
    x[40] = kNan;
    expect_refused("x must be finite for q4_0, got nan at value 8 of row 1; nothing was written",
                   convert(MIXEDKV_F32, MIXEDKV_Q4_0, 2, 32), kBad);
    EXPECT(y == std::vector<std::uint16_t>(64, 7), "written to");
    EXPECT(convert(MIXEDKV_F32, MIXEDKV_Q4_0, 2, 32, 128, 18, MIXEDKV_ALLOW_NON_FINITE) ==
               MIXEDKV_OK,
           "%s", mixedkv_last_error());
    EXPECT(y[0] != 7 && (y[9] & 0x7fff) > 0x7c00, "the second row's scale is no NaN: %x", y[9]);
    // A plain target keeps what is not finite already; blocks that hold too much for f16 are read.
    x.assign(64, 1.0f);
    x[3] = kInf;
    EXPECT(convert(MIXEDKV_F32, MIXEDKV_F16, 1, 32, 128, 64) == MIXEDKV_OK, "%s",
           mixedkv_last_error());
    EXPECT(y[3] == 0x7c00 && y[4] == 0x3c00, "%x %x", y[3], y[4]);
    x[3] = 3e5f;
    std::vector<std::uint16_t> blocks(9);
    EXPECT(mixedkv_convert_rows(MIXEDKV_F32, x.data(), 128, MIXEDKV_Q4_0, blocks.data(), 18, 1, 32,
                                0, 0) == MIXEDKV_OK,
           "%s", mixedkv_last_error());
    y.assign(64, 7);
    expect_refused("x must have magnitudes below 65520 for f16, got 300",
                   mixedkv_convert_rows(MIXEDKV_Q4_0, blocks.data(), 18, MIXEDKV_F16, y.data(), 64,
                                        1, 32, 0, 0),
                   kBad);
    EXPECT(y == std::vector<std::uint16_t>(64, 7), "written to");
    EXPECT(mixedkv_convert_rows(0, nullptr, 0, 2, nullptr, 0, 0, 32, 0, 0) == MIXEDKV_OK, "empty");
  });
  check("looking formats up refuses what is wrong", [&] {
    mixedkv_format_info info = sized<mixedkv_format_info>();
    mixedkv_format format = 0;
    std::size_t bytes = 0;
    expect_refused("format must be", mixedkv_get_format_info(-1, &info), kBad);
    expect_refused("info must not be null", mixedkv_get_format_info(0, nullptr), kBad);
    info.struct_size = 0;
    expect_refused("info.struct_size", mixedkv_get_format_info(0, &info), kBad);
    expect_refused("name must be a format's, got 'q9_0'", mixedkv_format_by_name("q9_0", &format),
                   kBad);
    expect_refused("name must not be null", mixedkv_format_by_name(nullptr, &format), kBad);
    expect_refused("format must not be null", mixedkv_format_by_name("f32", nullptr), kBad);
    expect_refused("n must be a multiple of 32", mixedkv_row_bytes(MIXEDKV_Q4_0, 5, &bytes), kBad);
    expect_refused("bytes must not be null", mixedkv_row_bytes(MIXEDKV_F32, 5, nullptr), kBad);
  });
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  test_faults();
  test_formats();
  return summary();
}
