// Advanced SIMD with dot products, FEAT_I8MM and FEAT_BF16 (both are part of Armv8.6; Neoverse V1,
// N2 and later, Apple since M2): neon_i8mm.cpp, with arithmetic in bf16 for who asks for it.
#define MIXEDKV_ISA neon_bf16
#define MIXEDKV_BF16 1
#define MIXEDKV_I8MM 1
#include "kernels/isa/neon_dotprod.cpp"
