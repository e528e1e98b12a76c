// Advanced SIMD with dot products and FEAT_BF16 (Neoverse V1, N2 and later, Apple since M2):
// neon_dotprod.cpp, with arithmetic in bf16 for who asks for it.
#define MIXEDKV_ISA neon_bf16
#define MIXEDKV_BF16 1
#include "neon_dotprod.cpp"
