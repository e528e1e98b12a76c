#include "kernels/cpu_features.h"

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#define MIXEDKV_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(__aarch64__) || defined(_M_ARM64)
#define MIXEDKV_ARM 1
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <cstddef>
#include <sys/sysctl.h>
#elif defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#endif
#endif

namespace mixedkv {
namespace {

#if defined(MIXEDKV_X86)

struct Registers {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
  Registers r;
#if defined(_MSC_VER)
  int values[4];
  __cpuidex(values, static_cast<int>(leaf), static_cast<int>(subleaf));
  r.eax = static_cast<std::uint32_t>(values[0]);
  r.ebx = static_cast<std::uint32_t>(values[1]);
  r.ecx = static_cast<std::uint32_t>(values[2]);
  r.edx = static_cast<std::uint32_t>(values[3]);
#else
  __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
#endif
  return r;
}

/// Extended control register 0: the register files that the system saves and restores.
std::uint64_t read_xcr0() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  std::uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<std::uint64_t>(high) << 32 | low;
#endif
}

constexpr std::uint32_t bit(int n) { return std::uint32_t{1} << n; }

// CPUID leaf 1, ecx
constexpr std::uint32_t kLeaf1EcxFma = bit(12);
constexpr std::uint32_t kLeaf1EcxOsxsave = bit(27);
constexpr std::uint32_t kLeaf1EcxAvx = bit(28);
constexpr std::uint32_t kLeaf1EcxF16c = bit(29);
// CPUID leaf 7, subleaf 0
constexpr std::uint32_t kLeaf7EbxAvx2 = bit(5);
constexpr std::uint32_t kLeaf7EbxAvx512f = bit(16);
constexpr std::uint32_t kLeaf7EbxAvx512dq = bit(17);
constexpr std::uint32_t kLeaf7EbxAvx512bw = bit(30);
constexpr std::uint32_t kLeaf7EbxAvx512vl = bit(31);
constexpr std::uint32_t kLeaf7EcxAvx512Vnni = bit(11);
// CPUID leaf 7, subleaf 1, eax
constexpr std::uint32_t kLeaf7Sub1EaxAvxVnni = bit(4);
constexpr std::uint32_t kLeaf7Sub1EaxAvx512Bf16 = bit(5);
// XCR0
constexpr std::uint64_t kXcr0Xmm = bit(1);
constexpr std::uint64_t kXcr0Ymm = bit(2);
constexpr std::uint64_t kXcr0Opmask = bit(5);
constexpr std::uint64_t kXcr0ZmmLowHalves = bit(6);
constexpr std::uint64_t kXcr0Zmm16To31 = bit(7);
constexpr std::uint64_t kXcr0Avx = kXcr0Xmm | kXcr0Ymm;
constexpr std::uint64_t kXcr0Avx512 = kXcr0Avx | kXcr0Opmask | kXcr0ZmmLowHalves | kXcr0Zmm16To31;

CpuFeatures detect() {
  CpuFeatures features;
  const std::uint32_t max_leaf = cpuid(0, 0).eax;
  if (max_leaf < 7)
    return features;
  const Registers leaf1 = cpuid(1, 0);
  const auto has = [](std::uint32_t reg, std::uint32_t mask) { return (reg & mask) == mask; };
  if (!has(leaf1.ecx, kLeaf1EcxOsxsave | kLeaf1EcxAvx))
    return features;
  const std::uint64_t xcr0 = read_xcr0();
  if ((xcr0 & kXcr0Avx) != kXcr0Avx)
    return features;
  const Registers leaf7 = cpuid(7, 0);
  const Registers leaf7_1 = leaf7.eax >= 1 ? cpuid(7, 1) : Registers();
  features.fma = has(leaf1.ecx, kLeaf1EcxFma);
  features.f16c = has(leaf1.ecx, kLeaf1EcxF16c);
  features.avx2 = has(leaf7.ebx, kLeaf7EbxAvx2);
  features.avx_vnni = has(leaf7_1.eax, kLeaf7Sub1EaxAvxVnni);
  if ((xcr0 & kXcr0Avx512) != kXcr0Avx512)
    return features;
  features.avx512f = has(leaf7.ebx, kLeaf7EbxAvx512f);
  features.avx512dq = has(leaf7.ebx, kLeaf7EbxAvx512dq);
  features.avx512bw = has(leaf7.ebx, kLeaf7EbxAvx512bw);
  features.avx512vl = has(leaf7.ebx, kLeaf7EbxAvx512vl);
  features.avx512_vnni = has(leaf7.ecx, kLeaf7EcxAvx512Vnni);
  features.avx512_bf16 = has(leaf7_1.eax, kLeaf7Sub1EaxAvx512Bf16);
  return features;
}

#elif defined(MIXEDKV_ARM) && defined(__linux__)

// The kernel's names are HWCAP_* and HWCAP2_*; older headers lack some of them.
constexpr unsigned long kHwcapAsimd = 1ul << 1;
constexpr unsigned long kHwcapFphp = 1ul << 9;
constexpr unsigned long kHwcapAsimdhp = 1ul << 10;
constexpr unsigned long kHwcapAsimddp = 1ul << 20;
constexpr unsigned long kHwcap2I8mm = 1ul << 13;
constexpr unsigned long kHwcap2Bf16 = 1ul << 14;

CpuFeatures detect() {
  CpuFeatures features;
  const unsigned long hwcap = getauxval(AT_HWCAP);
  const unsigned long hwcap2 = getauxval(AT_HWCAP2);
  features.asimd = (hwcap & kHwcapAsimd) != 0;
  features.fp16 = (hwcap & kHwcapFphp) != 0 && (hwcap & kHwcapAsimdhp) != 0;
  features.dotprod = (hwcap & kHwcapAsimddp) != 0;
  features.i8mm = (hwcap2 & kHwcap2I8mm) != 0;
  features.bf16 = (hwcap2 & kHwcap2Bf16) != 0;
  return features;
}

#elif defined(MIXEDKV_ARM) && defined(__APPLE__)

bool sysctl_flag(const char *name) {
  int value = 0;
  std::size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

CpuFeatures detect() {
  CpuFeatures features;
  features.asimd = true; // every aarch64 Mac has it
  features.fp16 = sysctl_flag("hw.optional.arm.FEAT_FP16");
  features.dotprod = sysctl_flag("hw.optional.arm.FEAT_DotProd");
  features.i8mm = sysctl_flag("hw.optional.arm.FEAT_I8MM");
  features.bf16 = sysctl_flag("hw.optional.arm.FEAT_BF16");
  return features;
}

#elif defined(MIXEDKV_ARM) && defined(_WIN32)

constexpr DWORD kArmV82DotProduct = 43; // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE

CpuFeatures detect() {
  CpuFeatures features;
  features.asimd = true; // Windows on Arm requires it
  features.dotprod = IsProcessorFeaturePresent(kArmV82DotProduct) != 0;
  return features;
}

#else

CpuFeatures detect() { return CpuFeatures(); }

#endif

} // namespace

const CpuFeatures &cpu_features() noexcept {
  static const CpuFeatures features = detect();
  return features;
}

} // namespace mixedkv
