// What this processor, and the system that runs on it, can execute. Asked once.
#pragma once

namespace mixedkv {

/// A field is true where the processor has the instructions and the system saves the registers
/// that they use. Fields of another architecture stay false.
struct CpuFeatures {
  // x86-64
  bool avx2 = false;
  bool fma = false;
  bool f16c = false;
  bool avx512f = false;
  bool avx512bw = false;
  bool avx512dq = false;
  bool avx512vl = false;
  bool avx512_vnni = false;
  bool avx512_bf16 = false;
  bool avx_vnni = false;
  // aarch64
  bool asimd = false;
  bool fp16 = false; ///< arithmetic on halves (FPHP and ASIMDHP)
  bool dotprod = false;
  bool i8mm = false;
  bool bf16 = false;
};

const CpuFeatures &cpu_features() noexcept;

} // namespace mixedkv
