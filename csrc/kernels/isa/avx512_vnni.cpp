// AVX-512 with VNNI (Intel since Ice Lake and Cascade Lake, AMD since Zen 4): avx512.cpp, but that
// over packed Q4_0 vpdpbusd takes the place of vpmaddubsw and vpaddw, vpdpwssd that of vpmaddwd and
// vpaddd. Over ggml's rows of blocks they would not pay: there a block's scale forces a sum across
// lanes, or a conversion and an FMA, for every (row, key, block).
#define MIXEDKV_ISA avx512_vnni
#define MIXEDKV_VNNI 1
#include "kernels/isa/avx512.cpp"
