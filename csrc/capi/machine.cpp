// Threads and instruction sets.
#include "capi/checks.h"

#include "mixedkv/runtime.h"

using namespace mixedkv;
using namespace mixedkv::capi;

mixedkv_status mixedkv_get_num_threads(int32_t *num_threads) {
  return guarded([&] {
    check_pointer("num_threads", num_threads, alignof(int32_t));
    *num_threads = get_num_threads();
  });
}

mixedkv_status mixedkv_set_num_threads(int32_t num_threads) {
  return guarded([&] { set_num_threads(num_threads); });
}

int32_t mixedkv_isa_count(void) {
  int32_t count = 0;
  guarded([&] { count = static_cast<int32_t>(compiled_isas().size()); });
  return count;
}

mixedkv_status mixedkv_get_isa_info(int32_t i, mixedkv_isa_info *info) {
  return guarded([&] {
    const std::vector<IsaInfo> isas = compiled_isas();
    check_range("i", i, 0, static_cast<std::int64_t>(isas.size()) - 1);
    const IsaInfo &isa = isas[static_cast<std::size_t>(i)];
    mixedkv_isa_info own{};
    own.name = isa.name;
    own.needs = isa.requires_;
    own.available = isa.available;
    own.has_compute_bf16 = isa.has_bf16;
    write_struct("info", own, info, MIXEDKV_FIRST_SIZE(mixedkv_isa_info, has_compute_bf16));
  });
}

mixedkv_status mixedkv_active_isa(const char **name) {
  return guarded([&] {
    check_pointer("name", static_cast<const void *>(name), alignof(const char *));
    *name = active_isa();
  });
}

mixedkv_status mixedkv_select_isa(const char *name) {
  return guarded([&] {
    check_pointer("name", name, 1);
    select_isa(name);
  });
}
