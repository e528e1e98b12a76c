// AVX2 with AVX-VNNI (Intel since Alder Lake and Sapphire Rapids, AMD since Zen 5): avx2.cpp, but
// that over packed Q4_0 vpdpbusd and vpdpwssd each take the place of two instructions.
#define MIXEDKV_ISA avx2_vnni
#define MIXEDKV_VNNI 1
#include "kernels/isa/avx2.cpp"
