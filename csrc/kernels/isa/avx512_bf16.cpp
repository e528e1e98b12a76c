// AVX-512 with VNNI and BF16 (Intel since Cooper Lake and Sapphire Rapids, AMD since Zen 4):
// avx512_vnni.cpp, with arithmetic in bf16 for who asks for it. vdpbf16ps does twice the products
// of an FMA; six rows by four panels of sums leave registers for four panels, and pairs of the rows
// come as operands in memory.
#define MIXEDKV_ISA avx512_bf16
#define MIXEDKV_VNNI 1
#define MIXEDKV_BF16 1
#include "kernels/isa/avx512.cpp"
