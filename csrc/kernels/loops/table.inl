// The one symbol of a vector ISA's file, made of what it has included so far. The file defines
// MIXEDKV_ISA, the variant's name as an identifier, and may define MIXEDKV_QK_Q4_0, its own qk over
// Q4_0 rows, MIXEDKV_PREPARE_PACKED and MIXEDKV_QK_PACKED, its own over packed keys, and
// MIXEDKV_BF16 where it has included bf16.inl.

#if !defined(MIXEDKV_QK_Q4_0)
#define MIXEDKV_QK_Q4_0 qk_q4_0
#endif
#if !defined(MIXEDKV_QK_PACKED)
#define MIXEDKV_PREPARE_PACKED prepare_packed_query
#define MIXEDKV_QK_PACKED qk_packed
#endif
#define MIXEDKV_TABLE_NAME(isa) kernels_##isa
#define MIXEDKV_TABLE(isa) MIXEDKV_TABLE_NAME(isa)
#define MIXEDKV_TEXT_OF(isa) #isa
#define MIXEDKV_TEXT(isa) MIXEDKV_TEXT_OF(isa)

const Kernels MIXEDKV_TABLE(MIXEDKV_ISA) = {
    MIXEDKV_TEXT(MIXEDKV_ISA),
    f32_to_f16,
    f16_to_f32,
    quantize_row_q4_0_f32,
    quantize_row_q4_0_f16,
    dequantize_row_q4_0_f32,
    dequantize_row_q4_0_f16,
    all_finite_f32,
    all_finite_f16,
    {qk_f32, qk_f16, MIXEDKV_QK_Q4_0},
    {pv_f32, pv_f16, pv_q4_0},
    MIXEDKV_PREPARE_PACKED,
    MIXEDKV_QK_PACKED,
    pv_packed,
    unpack_packed_values,
    unpack_packed_keys,
    {transpose_keys<float>, transpose_keys<f16_t>, transpose_keys<block_q4_0>},
    qk_transposed,
    row_max,
    exp_sum,
    soft_cap,
    scale,
    axpy,
    {pack_keys<float>, pack_keys<f16_t>},
    {pack_values<float>, pack_values<f16_t>},
#if defined(MIXEDKV_BF16)
    &bf16_kernels,
#else
    nullptr,
#endif
};
