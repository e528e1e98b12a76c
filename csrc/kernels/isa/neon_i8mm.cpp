// Advanced SIMD with dot products and FEAT_I8MM (Neoverse V1, N2 and later, Apple since M2):
// neon_dotprod.cpp, with packed keys multiplied as small matrices (loops/tile_products.inl).
#define MIXEDKV_ISA neon_i8mm
#define MIXEDKV_I8MM 1
#include "kernels/isa/neon_dotprod.cpp"
