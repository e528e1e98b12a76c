// The C interface: structures of other versions' sizes, and options and results by the C++
// interface's; errors of several threads.
//
// Usage: test_capi_versions [part of a check's name]

#include "capi_call.h"
#include "mixedkv/attention.h"

#include <cstddef>
#include <string>
#include <thread>

using namespace testing;

namespace {

void test_versions() {
  check("versions are the header's", [] {
    EXPECT(std::string(mixedkv_version()) == MIXEDKV_VERSION_STRING, "%s", mixedkv_version());
    EXPECT(mixedkv_abi_version() == MIXEDKV_ABI_VERSION, "%d", mixedkv_abi_version());
  });
  check("structures of a later version: zeros pass, news is unsupported", [] {
    struct Later {
      mixedkv_params params;
      std::int64_t news;
    } later;
    Call call;
    call.expect_ok();
    const std::vector<float> want = call.out;
    std::memset(&later, 0, sizeof later);
    later.params = call.params;
    later.params.struct_size = sizeof later;
    call.out.assign(call.out.size(), kNan);
    EXPECT(mixedkv_attend(&call.problem, 1, &later.params) == MIXEDKV_OK, "%s",
           mixedkv_last_error());
    EXPECT(call.out == want, "other bits");
    later.news = 1;
    expect_refused("not all zero beyond", mixedkv_attend(&call.problem, 1, &later.params),
                   MIXEDKV_UNSUPPORTED);

    struct LaterSegment {
      mixedkv_segment segment;
      std::int64_t news;
    } segments[2];
    std::memset(segments, 0, sizeof segments);
    for (int s = 0; s < 2; ++s) {
      segments[s].segment = call.segments[s];
      segments[s].segment.struct_size = sizeof segments[s];
    }
    call.problem.segments = &segments[0].segment;
    call.out.assign(call.out.size(), kNan);
    call.expect_ok();
    EXPECT(call.out == want, "other bits, of an array");

    struct LaterInfo {
      mixedkv_format_info info;
      std::int64_t news;
    } info;
    info.info.struct_size = sizeof info;
    info.news = 5;
    EXPECT(mixedkv_get_format_info(MIXEDKV_Q4_0, &info.info) == MIXEDKV_OK, "%s",
           mixedkv_last_error());
    EXPECT(info.info.struct_size == sizeof info && info.news == 5 && info.info.block_bytes == 18,
           "%d", info.info.block_bytes);
  });
  check("structures of an earlier version have what came later at zero", [] {
    Call call;
    call.expect_ok();
    const std::vector<float> want = call.out;
    call.params.struct_size = offsetof(mixedkv_params, window_right);
    call.params.window_right = -9; // not the library's to read
    call.out.assign(call.out.size(), kNan);
    call.expect_ok();
    EXPECT(call.out == want, "other bits");

    // Segments lie one after the other in their own size.
    constexpr std::size_t kSize = offsetof(mixedkv_segment, k_layout);
    alignas(mixedkv_segment) char earlier[2 * kSize];
    for (std::size_t i = 0; i < 2; ++i) {
      mixedkv_segment segment = call.segments[i];
      segment.struct_size = kSize;
      std::memcpy(earlier + i * kSize, &segment, kSize);
    }
    call.problem.segments = reinterpret_cast<const mixedkv_segment *>(earlier);
    call.out.assign(call.out.size(), kNan);
    call.expect_ok();
    EXPECT(call.out == want, "other bits, of a segment");
  });
  check("compute type auto is one of the two", [] {
    Call f32, bf16, either;
    f32.expect_ok();
    bf16.params.compute_type = MIXEDKV_COMPUTE_BF16;
    bf16.expect_ok();
    either.params.compute_type = MIXEDKV_COMPUTE_AUTO;
    either.expect_ok();
    EXPECT(either.out ==
               (mixedkv::auto_compute_type() == mixedkv::ComputeType::bf16 ? bf16 : f32).out,
           "other bits");
  });
  check("results with an lse of +inf or -inf saw nothing", [] {
    const float outs[] = {1, 2, kNan, kInf, 5, 6}, lses[] = {0.5f, kInf, -kInf};
    float out[2], lse;
    EXPECT(mixedkv_merge_states(outs, lses, 3, 1, 2, out, &lse) == MIXEDKV_OK, "%s",
           mixedkv_last_error());
    EXPECT(out[0] == 1 && out[1] == 2 && lse == 0.5f, "%g %g %g", static_cast<double>(out[0]),
           static_cast<double>(out[1]), static_cast<double>(lse));
    EXPECT(mixedkv_merge_states(&outs[2], &lses[1], 1, 1, 2, out, &lse) == MIXEDKV_OK, "%s",
           mixedkv_last_error());
    EXPECT(out[0] == 0 && out[1] == 0 && lse == -kInf, "%g %g", static_cast<double>(out[0]),
           static_cast<double>(lse));
  });
  check("every thread has errors of its own", [] {
    expect_refused("unknown ISA 'here'", mixedkv_select_isa("here"), MIXEDKV_INVALID_ARGUMENT);
    std::string at_first, then;
    std::thread other([&] {
      at_first = mixedkv_last_error();
      mixedkv_select_isa("there");
      then = mixedkv_last_error();
    });
    other.join();
    EXPECT(at_first.empty(), "'%s'", at_first.c_str());
    EXPECT(then.find("'there'") != std::string::npos, "'%s'", then.c_str());
    EXPECT(std::strstr(mixedkv_last_error(), "'here'") != nullptr, "'%s'", mixedkv_last_error());
    const std::string long_name(5000, 'x'); // is cut, and ends
    EXPECT(mixedkv_select_isa(long_name.c_str()) == MIXEDKV_INVALID_ARGUMENT, "taken");
    EXPECT(std::strlen(mixedkv_last_error()) == 511, "%zu", std::strlen(mixedkv_last_error()));
  });
  check("every status has a text", [] {
    for (mixedkv_status status = MIXEDKV_OK; status <= MIXEDKV_INTERNAL; ++status)
      EXPECT(std::strcmp(mixedkv_status_text(status), "unknown status") != 0, "%d", status);
    EXPECT(std::strcmp(mixedkv_status_text(-1), "unknown status") == 0, "-1");
  });
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  test_versions();
  return summary();
}
