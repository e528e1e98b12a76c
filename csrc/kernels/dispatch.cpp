#include "kernels/dispatch.h"

#include "kernels/cpu_features.h"
#include "kernels/isa_tables.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace mixedkv {
namespace {

struct Variant {
  const Kernels *kernels;
  const char *required;
  bool (*runs_on)(const CpuFeatures &);
};

[[maybe_unused]] bool has_avx2(const CpuFeatures &cpu) { return cpu.avx2 && cpu.fma && cpu.f16c; }
[[maybe_unused]] bool has_avx512(const CpuFeatures &cpu) {
  return has_avx2(cpu) && cpu.avx512f && cpu.avx512bw && cpu.avx512dq && cpu.avx512vl;
}

// Best first. The build defines MIXEDKV_HAVE_<ISA> for each file that it compiled.
const Variant kVariants[] = {
#if defined(MIXEDKV_HAVE_AVX512_BF16)
    {&kernels_avx512_bf16,
     "avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 avx2 fma f16c",
     [](const CpuFeatures &cpu) { return has_avx512(cpu) && cpu.avx512_vnni && cpu.avx512_bf16; }},
#endif
#if defined(MIXEDKV_HAVE_AVX512_VNNI)
    {&kernels_avx512_vnni, "avx512f avx512bw avx512dq avx512vl avx512_vnni avx2 fma f16c",
     [](const CpuFeatures &cpu) { return has_avx512(cpu) && cpu.avx512_vnni; }},
#endif
#if defined(MIXEDKV_HAVE_AVX512)
    {&kernels_avx512, "avx512f avx512bw avx512dq avx512vl avx2 fma f16c", has_avx512},
#endif
#if defined(MIXEDKV_HAVE_AVX2_VNNI)
    {&kernels_avx2_vnni, "avx2 fma f16c avx_vnni",
     [](const CpuFeatures &cpu) { return has_avx2(cpu) && cpu.avx_vnni; }},
#endif
#if defined(MIXEDKV_HAVE_AVX2)
    {&kernels_avx2, "avx2 fma f16c", has_avx2},
#endif
#if defined(MIXEDKV_HAVE_NEON_BF16)
    {&kernels_neon_bf16, "asimd fp16 dotprod i8mm bf16",
     [](const CpuFeatures &cpu) {
       return cpu.asimd && cpu.fp16 && cpu.dotprod && cpu.i8mm && cpu.bf16;
     }},
#endif
#if defined(MIXEDKV_HAVE_NEON_I8MM)
    {&kernels_neon_i8mm, "asimd dotprod i8mm",
     [](const CpuFeatures &cpu) { return cpu.asimd && cpu.dotprod && cpu.i8mm; }},
#endif
#if defined(MIXEDKV_HAVE_NEON_DOTPROD)
    {&kernels_neon_dotprod, "asimd dotprod",
     [](const CpuFeatures &cpu) { return cpu.asimd && cpu.dotprod; }},
#endif
#if defined(MIXEDKV_HAVE_NEON)
    {&kernels_neon, "asimd", [](const CpuFeatures &cpu) { return cpu.asimd; }},
#endif
    {&kernels_scalar, "", [](const CpuFeatures &) { return true; }},
};

bool is_available(const Variant &variant) { return variant.runs_on(cpu_features()); }

std::string join(const std::vector<std::string> &words) {
  std::string text;
  for (const std::string &word : words)
    text += (text.empty() ? "" : ", ") + word;
  return text;
}

/// source says where the name came from, for the message.
const Kernels &find(const std::string &name, const char *source) {
  for (const Variant &variant : kVariants) {
    if (name != variant.kernels->name)
      continue;
    if (is_available(variant))
      return *variant.kernels;
    throw std::invalid_argument(std::string(source) + " '" + name + "' needs " + variant.required +
                                ", which this machine lacks; available: " + join(available_isas()));
  }
  throw std::invalid_argument("unknown " + std::string(source) + " '" + name +
                              "'; available: " + join(available_isas()));
}

const Kernels &first_choice() {
  const char *forced = std::getenv("MIXEDKV_ISA");
  if (forced && *forced)
    return find(forced, "ISA (from MIXEDKV_ISA)");
  for (const Variant &variant : kVariants)
    if (is_available(variant))
      return *variant.kernels;
  return kernels_scalar;
}

/// Null until settled. The tables are constants, so relaxed order would do on every machine we
/// know; acquire costs nothing there.
std::atomic<const Kernels *> active{nullptr};

} // namespace

std::vector<IsaInfo> compiled_isas() {
  std::vector<IsaInfo> isas;
  for (const Variant &variant : kVariants)
    isas.push_back({variant.kernels->name, is_available(variant), variant.required,
                    variant.kernels->bf16 != nullptr});
  return isas;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Variant &variant : kVariants)
    if (is_available(variant))
      names.push_back(variant.kernels->name);
  return names;
}

const Kernels &active_kernels() {
  if (const Kernels *kernels = active.load(std::memory_order_acquire))
    return *kernels;
  // Two first calls at once settle on the same table; a select_isa in between wins.
  const Kernels *chosen = &first_choice();
  const Kernels *expected = nullptr;
  active.compare_exchange_strong(expected, chosen, std::memory_order_acq_rel,
                                 std::memory_order_acquire);
  return expected ? *expected : *chosen;
}

const char *active_isa() { return active_kernels().name; }

void select_isa(const std::string &name) {
  active.store(&find(name, "ISA"), std::memory_order_release);
}

const Kernels &kernels_for(const std::string &name) { return find(name, "ISA"); }

} // namespace mixedkv
