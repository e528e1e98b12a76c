/* mixedkv's C interface: C99, C++, and whatever can call C. Attention with carried state over rows
 * in any of the library's formats, the algebra of states, conversions, threads, instruction sets.
 *
 * Stable: what stands here keeps its name, its number and its meaning for a MIXEDKV_ABI_VERSION.
 * Structures grow at their ends only. The first member of each is its size as the caller knows it
 * (sizeof); members that the caller does not know count as zero, and zero stands for "not said" in
 * every optional member, so `mixedkv_params p = {.struct_size = sizeof p}` is a start. A structure
 * larger than the library knows is taken where its unknown part is all zero, and
 * MIXEDKV_UNSUPPORTED otherwise.
 *
 * Every function checks its arguments before anything is written and ends with a status;
 * mixedkv_last_error() tells which argument was wrong, and its value. What can't be checked is the
 * caller's: that memory is as large as sizes and strides say, and that what is written overlaps
 * nothing else of the call. Any thread may call anything; two calls at a time must not write to the
 * same memory. Results have the same bits for any number of threads. */
#ifndef MIXEDKV_C_H
#define MIXEDKV_C_H

#include "mixedkv/export.h"
#include "mixedkv/version.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MIXEDKV_ABI_VERSION 1

/* --- status ------------------------------------------------------------------------------------
 */

typedef int32_t mixedkv_status;
enum {
  MIXEDKV_OK = 0,
  MIXEDKV_INVALID_ARGUMENT = 1,
  MIXEDKV_OUT_OF_MEMORY = 2,
  MIXEDKV_UNSUPPORTED = 3, /* a newer header's structure asks for what this library lacks */
  MIXEDKV_INTERNAL = 4     /* a fault of the library's own */
};

/* "ok", "invalid argument", ...; never null. */
MIXEDKV_API const char *mixedkv_status_text(mixedkv_status status);
/* What went wrong in the last call of this thread that did not end with MIXEDKV_OK; "" before the
 * first. Valid until this thread's next such call; never null. */
MIXEDKV_API const char *mixedkv_last_error(void);

/* The library's own, which may differ from the header's: "0.1.0", and MIXEDKV_ABI_VERSION. */
MIXEDKV_API const char *mixedkv_version(void);
MIXEDKV_API int32_t mixedkv_abi_version(void);

/* --- formats -----------------------------------------------------------------------------------
 */

/* How the values of a row are stored. Others are found by name: mixedkv_format_by_name. */
typedef int32_t mixedkv_format;
enum { MIXEDKV_F32 = 0, MIXEDKV_F16 = 1, MIXEDKV_Q4_0 = 2 };

typedef struct mixedkv_format_info {
  size_t struct_size;   /* in: sizeof */
  const char *name;     /* "q4_0"; the library's, for good */
  int32_t block_values; /* values that share a block; 1 where each stands alone */
  int32_t block_bytes;
  int32_t ggml_type; /* ggml's number of the same bytes, -1 where it has none */
  int32_t alignment; /* rows begin at a multiple of it */
  double overflow;   /* finite values of this magnitude and more don't stay finite; 0: all do */
} mixedkv_format_info;

/* Formats have the numbers 0 to count - 1. */
MIXEDKV_API int32_t mixedkv_format_count(void);
MIXEDKV_API mixedkv_status mixedkv_get_format_info(mixedkv_format format,
                                                   mixedkv_format_info *info);
MIXEDKV_API mixedkv_status mixedkv_format_by_name(const char *name, mixedkv_format *format);
/* Bytes of a row of n values, whole blocks of the format. */
MIXEDKV_API mixedkv_status mixedkv_row_bytes(mixedkv_format format, int64_t n, size_t *bytes);

/* A flag of mixedkv_convert_rows: values that are not finite, or don't stay so, are no error. A
 * block that holds an infinity or a NaN gets a scale of NaN; a finite value beyond the format
 * becomes what ggml makes of it, mostly infinities. */
#define MIXEDKV_ALLOW_NON_FINITE 1u
/* Another: scales of q4_0 and iq4_nl by least squared error, where ggml's err more (nl4's and nl3's
 * always are); other formats refuse it. */
#define MIXEDKV_FIT_SCALES 2u

/* num_rows rows of n values from one format to another; row i begins at x + i * x_stride bytes,
 * likewise y; x and y share no memory. All values are looked at first: a finite one that y's format
 * would not keep finite (mixedkv_format_info.overflow), and, where y has blocks, one that is not
 * finite, is MIXEDKV_INVALID_ARGUMENT, and nothing is written. Where both formats are the same,
 * rows are copied as they are. num_threads 0: the default. */
MIXEDKV_API mixedkv_status mixedkv_convert_rows(mixedkv_format from, const void *x,
                                                ptrdiff_t x_stride, mixedkv_format to, void *y,
                                                ptrdiff_t y_stride, int64_t num_rows, int64_t n,
                                                uint32_t flags, int32_t num_threads);

/* --- attention ---------------------------------------------------------------------------------
 */

/* Query i of head h is at data + h * head_stride + row_stride * (index ? index[i] : i), strides in
 * bytes; its position is pos ? pos[i] : pos_start + i. f32 or f16. */
typedef struct mixedkv_queries {
  size_t struct_size;
  const void *data;
  ptrdiff_t head_stride;
  ptrdiff_t row_stride;
  const int32_t *index; /* [len] or null; from 0 */
  const int32_t *pos;   /* [len] or null */
  int64_t pos_start;
  int64_t len;
  mixedkv_format format;
  int32_t reserved; /* zero */
} mixedkv_queries;

/* How keys or values lie. Rows alone are served: the library's tiles of 16 tokens, which its caches
 * keep quantised rows in, are an inner layout, different from version to version, and no layout to
 * hand over. Any other number is MIXEDKV_UNSUPPORTED. */
typedef int32_t mixedkv_layout;
enum { MIXEDKV_ROWS = 0 };

/* A run of keys and values, for all kv heads, in any formats. Key j of kv head h is at
 * k + h * k_head_stride + k_row_stride * (index ? index[j] : j), likewise v; strides in bytes.
 * Or keys lie in pages: key j is number i = j % page_size of page p = pages[j / page_size], at
 * k + h * k_head_stride + p * k_page_stride + k_row_stride * i; what the last page holds beyond len
 * is nobody's. The position of key j is pos ? pos[j] : pos_start + j. */
typedef struct mixedkv_segment {
  size_t struct_size;
  const void *k;
  const void *v;
  ptrdiff_t k_head_stride;
  ptrdiff_t k_row_stride;
  ptrdiff_t v_head_stride;
  ptrdiff_t v_row_stride;
  const int32_t *index; /* [len] or null; strictly ascending from 0 */
  const int32_t *pos;   /* [len] or null */
  int64_t pos_start;
  int64_t len;
  mixedkv_format k_format;
  mixedkv_format v_format;
  const int32_t *pages; /* [len / page_size, rounded up] or null; from 0, in any order; no index */
  int64_t page_size;    /* keys */
  ptrdiff_t k_page_stride;
  ptrdiff_t v_page_stride;
  mixedkv_layout k_layout; /* MIXEDKV_ROWS */
  mixedkv_layout v_layout;
} mixedkv_segment;

typedef int32_t mixedkv_mask_type;
enum {
  MIXEDKV_MASK_F32 = 0, /* added to the scaled logits; -inf removes the key */
  MIXEDKV_MASK_F16 = 1,
  MIXEDKV_MASK_BOOL = 2 /* a byte; not zero: attend */
};

/* The entry of head h, query i, key j (counted through all segments) is at data + h * head_stride +
 * i * query_stride + j * key_stride, in bytes; a stride may be 0. */
typedef struct mixedkv_mask {
  size_t struct_size;
  const void *data;
  ptrdiff_t head_stride;
  ptrdiff_t query_stride;
  ptrdiff_t key_stride;
  mixedkv_mask_type type;
  int32_t reserved; /* zero */
} mixedkv_mask;

/* Carried state of num_qo_heads * len rows, row h * len + i, contiguous: ms [rows, 2], the running
 * maximum M of a row's scaled logits x and then the sum S of exp(x - M); acc [rows, head_dim_v],
 * the sum of exp(x - M) * v. mixedkv_state_init begins one. */
typedef struct mixedkv_state {
  size_t struct_size;
  float *ms;
  float *acc;
} mixedkv_state;

/* Where the normalised result goes: query i of head h to data + h * head_stride + row_stride *
 * (index ? index[i] : i), the log-sum-exp of its logits (natural; -inf where it saw no key) to lse
 * likewise. Strides count floats. data null: no result is wanted; lse null: no lse. */
typedef struct mixedkv_output {
  size_t struct_size;
  float *data;
  ptrdiff_t head_stride;
  ptrdiff_t row_stride;
  float *lse;
  ptrdiff_t lse_head_stride;
  ptrdiff_t lse_row_stride;
  const int32_t *index; /* [len] or null; from 0, no number twice */
} mixedkv_output;

/* Some queries, and the keys that they see: a row of a batch, a sequence of a step. */
typedef struct mixedkv_problem {
  size_t struct_size;
  const mixedkv_queries *q;
  const mixedkv_segment *segments; /* [num_segments], all of one struct_size */
  int64_t num_segments;
  const mixedkv_mask *mask;   /* null: none */
  const mixedkv_state *state; /* continued; null: the result starts from nothing */
  const mixedkv_output *out;  /* null: none; a state or a result is wanted */
} mixedkv_problem;

typedef int32_t mixedkv_compute_type;
enum {
  MIXEDKV_COMPUTE_F32 = 0,
  MIXEDKV_COMPUTE_BF16 = 1, /* products of many query rows, where the instruction set has it */
  /* Whichever is the faster here: a trial of some milliseconds at the process's first such call;
   * the environment variable MIXEDKV_COMPUTE_TYPE, "f32" or "bf16", decides beforehand. */
  MIXEDKV_COMPUTE_AUTO = 2
};

/* Flags of mixedkv_params. */
#define MIXEDKV_CAUSAL 1u       /* a query sees keys up to its own position */
#define MIXEDKV_WINDOW_LEFT 2u  /* and, at position p, those from p - window_left on */
#define MIXEDKV_WINDOW_RIGHT 4u /* and those up to p + window_right */

/* What all problems of a call share. */
typedef struct mixedkv_params {
  size_t struct_size;
  int32_t num_qo_heads; /* query head h reads kv head h / (num_qo_heads / num_kv_heads) */
  int32_t num_kv_heads; /* divides num_qo_heads */
  int32_t head_dim;
  int32_t head_dim_v; /* 0: head_dim */
  uint32_t flags;
  float sm_scale;        /* 0: 1 / sqrt(head_dim) */
  float logits_soft_cap; /* 0: none; else a normal number, 2**-126 or more */
  mixedkv_compute_type compute_type;
  int64_t window_left;       /* with MIXEDKV_WINDOW_LEFT; from 0 to 2**40 */
  const float *alibi_slopes; /* [num_qo_heads] or null */
  const float *sinks;        /* [num_qo_heads] or null: logits that take part in S at the end */
  int32_t num_threads;       /* 0: the default */
  int32_t reserved;          /* zero */
  int64_t window_right;      /* with MIXEDKV_WINDOW_RIGHT; from 0 to 2**40 */
} mixedkv_params;

/* Attends all problems: continues each one's state over its segments in their order, and writes its
 * normalised result where it wants one. problems: all of one struct_size. */
MIXEDKV_API mixedkv_status mixedkv_attend(const mixedkv_problem *problems, int64_t num_problems,
                                          const mixedkv_params *params);

/* States that have seen nothing: M = -inf, S = 0; acc is left as it is, and need not be set. */
MIXEDKV_API mixedkv_status mixedkv_state_init(const mixedkv_state *state, int64_t num_rows);
/* The result acc / S and lse M + ln S of a state of num_qo_heads * len rows; rows that saw no key
 * give zeros and -inf. sinks: [num_qo_heads] or null, as above. */
MIXEDKV_API mixedkv_status mixedkv_finalize(const mixedkv_state *state, int32_t num_qo_heads,
                                            int64_t len, int32_t head_dim_v, const float *sinks,
                                            const mixedkv_output *out);
/* a becomes the state of the union of what a and b saw; rows whose M is -inf saw nothing. */
MIXEDKV_API mixedkv_status mixedkv_merge(const mixedkv_state *a, const mixedkv_state *b,
                                         int64_t num_rows, int32_t head_dim_v);
/* Merges num_states normalised results, outs [num_states, num_rows, head_dim_v] and lses
 * [num_states, num_rows], into out [num_rows, head_dim_v] and lse [num_rows], all contiguous. An
 * lse of -inf or +inf (which is how FlashAttention 2 and vLLM write it) says that a result saw
 * nothing; what it holds is not read. */
MIXEDKV_API mixedkv_status mixedkv_merge_states(const float *outs, const float *lses,
                                                int64_t num_states, int64_t num_rows,
                                                int32_t head_dim_v, float *out, float *lse);

/* --- the machine -------------------------------------------------------------------------------
 */

/* Threads of a call that does not say: what was set, else MIXEDKV_NUM_THREADS, else the CPUs that
 * this process may use. */
MIXEDKV_API mixedkv_status mixedkv_get_num_threads(int32_t *num_threads);
MIXEDKV_API mixedkv_status mixedkv_set_num_threads(int32_t num_threads); /* 1 to 1024 */

typedef struct mixedkv_isa_info {
  size_t struct_size;       /* in: sizeof */
  const char *name;         /* "avx2"; the library's, for good */
  const char *needs;        /* features of the processor: "avx2 fma f16c" */
  int32_t available;        /* 1: this machine can run it */
  int32_t has_compute_bf16; /* 1: it has kernels for MIXEDKV_COMPUTE_BF16 */
} mixedkv_isa_info;

/* The instruction sets that this build has kernels for, best first, and "scalar" last. */
MIXEDKV_API int32_t mixedkv_isa_count(void);
MIXEDKV_API mixedkv_status mixedkv_get_isa_info(int32_t i, mixedkv_isa_info *info);
/* The one in use: what was selected, else MIXEDKV_ISA, else the best one of this machine. */
MIXEDKV_API mixedkv_status mixedkv_active_isa(const char **name);
MIXEDKV_API mixedkv_status mixedkv_select_isa(const char *name);

#ifdef __cplusplus
}
#endif

#endif
