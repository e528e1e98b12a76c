/* mixedkv from C: old keys and values quantised to Q4_0, new ones in f16, attended one after the
 * other into a state that carries what the softmax needs, and finalized.
 *
 * Usage: carried_state                some numbers of its own; prints a part of the result
 *        carried_state INPUT OUTPUT   numbers from a file, all of the result into another: INPUT is
 *                                     a struct sizes, q, k, v; OUTPUT is out, lse (float, C order)
 */
#include <mixedkv/c.h>

#include <stdio.h>
#include <stdlib.h>

struct sizes {
  int32_t num_qo_heads, num_kv_heads, qo_len, head_dim;
  int32_t old_len, new_len; /* keys of the two segments */
};

static void stop(const char *what) {
  fprintf(stderr, "carried_state: %s\n", what);
  exit(1);
}

static void check(mixedkv_status status) {
  if (status != MIXEDKV_OK) {
    fprintf(stderr, "%s: ", mixedkv_status_text(status));
    stop(mixedkv_last_error());
  }
}

static void *allocate(size_t bytes) {
  void *memory = calloc(bytes + 1, 1);
  if (memory == NULL)
    stop("there is not enough memory");
  return memory;
}

/* n numbers of a file, or from -1 to 1 where there is none. */
static float *read_floats(FILE *file, size_t n) {
  static uint32_t random = 42;
  float *values = allocate(n * sizeof *values);
  if (file != NULL && fread(values, sizeof *values, n, file) != n)
    stop("the input ends too early");
  for (size_t i = 0; file == NULL && i < n; ++i) {
    random = random * 1664525u + 1013904223u;
    values[i] = (float)(random >> 8) / 8388608.0f - 1.0f;
  }
  return values;
}

/* Rows [heads, len] of x, a part of [heads, total], in another format: [heads, len] again. */
static void *convert(const float *x, const struct sizes *s, int32_t begin, int32_t len,
                     mixedkv_format format, size_t *row) {
  const int32_t total = s->old_len + s->new_len;
  const ptrdiff_t x_row = (ptrdiff_t)sizeof(float) * s->head_dim;
  check(mixedkv_row_bytes(format, s->head_dim, row));
  char *rows = allocate((size_t)s->num_kv_heads * (size_t)len * *row);
  for (int32_t h = 0; h < s->num_kv_heads; ++h)
    check(mixedkv_convert_rows(MIXEDKV_F32, x + (size_t)(h * total + begin) * (size_t)s->head_dim,
                               x_row, format, rows + (size_t)(h * len) * *row, (ptrdiff_t)*row, len,
                               s->head_dim, 0, 0));
  return rows;
}

/* Keys and values begin to begin + len as a segment in a format. */
static mixedkv_segment make_segment(const float *k, const float *v, const struct sizes *s,
                                    int32_t begin, int32_t len, mixedkv_format format) {
  size_t row;
  mixedkv_segment segment = {.struct_size = sizeof segment, .pos_start = begin, .len = len};
  segment.k = convert(k, s, begin, len, format, &row);
  segment.v = convert(v, s, begin, len, format, &row);
  segment.k_format = segment.v_format = format;
  segment.k_row_stride = segment.v_row_stride = (ptrdiff_t)row;
  segment.k_head_stride = segment.v_head_stride = (ptrdiff_t)row * len;
  return segment;
}

int main(int argc, char **argv) {
  struct sizes s = {8, 2, 1, 64, 900, 100};
  FILE *input = NULL;
  if (argc == 3) {
    input = fopen(argv[1], "rb");
    if (input == NULL || fread(&s, sizeof s, 1, input) != 1)
      stop("the input can't be read");
  }
  const int32_t kv_len = s.old_len + s.new_len;
  const size_t q_rows = (size_t)s.num_qo_heads * (size_t)s.qo_len;
  const size_t kv_size = (size_t)s.num_kv_heads * (size_t)kv_len * (size_t)s.head_dim;
  float *q = read_floats(input, q_rows * (size_t)s.head_dim);
  float *k = read_floats(input, kv_size);
  float *v = read_floats(input, kv_size);
  if (input != NULL)
    fclose(input);

  const mixedkv_segment segments[2] = {
      make_segment(k, v, &s, 0, s.old_len, MIXEDKV_Q4_0),
      make_segment(k, v, &s, s.old_len, s.new_len, MIXEDKV_F16),
  };
  const ptrdiff_t row = (ptrdiff_t)sizeof(float) * s.head_dim;
  const mixedkv_queries queries = {
      .struct_size = sizeof queries,
      .data = q,
      .head_stride = row * s.qo_len,
      .row_stride = row,
      .pos_start = kv_len - s.qo_len, /* the last query is the last key's token */
      .len = s.qo_len,
  };
  const mixedkv_params params = {
      .struct_size = sizeof params,
      .num_qo_heads = s.num_qo_heads,
      .num_kv_heads = s.num_kv_heads,
      .head_dim = s.head_dim,
      .flags = MIXEDKV_CAUSAL,
  };
  const mixedkv_state state = {
      .struct_size = sizeof state,
      .ms = allocate(q_rows * 2 * sizeof(float)),
      .acc = allocate(q_rows * (size_t)s.head_dim * sizeof(float)),
  };
  check(mixedkv_state_init(&state, (int64_t)q_rows));
  for (int i = 0; i < 2; ++i) { /* other work, on other threads or machines, may come between */
    const mixedkv_problem problem = {
        .struct_size = sizeof problem,
        .q = &queries,
        .segments = &segments[i],
        .num_segments = 1,
        .state = &state,
    };
    check(mixedkv_attend(&problem, 1, &params));
  }
  const mixedkv_output out = {
      .struct_size = sizeof out,
      .data = allocate(q_rows * (size_t)s.head_dim * sizeof(float)),
      .head_stride = (ptrdiff_t)s.qo_len * s.head_dim,
      .row_stride = s.head_dim,
      .lse = allocate(q_rows * sizeof(float)),
      .lse_head_stride = s.qo_len,
      .lse_row_stride = 1,
  };
  check(mixedkv_finalize(&state, s.num_qo_heads, s.qo_len, s.head_dim, NULL, &out));

  const char *isa;
  check(mixedkv_active_isa(&isa));
  printf("mixedkv %s on %s: %d keys in Q4_0 and %d in f16\n", mixedkv_version(), isa,
         (int)s.old_len, (int)s.new_len);
  for (int32_t h = 0; h < s.num_qo_heads && h < 4; ++h) {
    const float *x = out.data + h * out.head_stride;
    printf("head %d: %9.6f %9.6f %9.6f ... lse %.6f\n", (int)h, (double)x[0], (double)x[1],
           (double)x[2], (double)out.lse[h * out.lse_head_stride]);
  }
  if (argc == 3) {
    FILE *output = fopen(argv[2], "wb");
    const size_t n = q_rows * (size_t)s.head_dim;
    if (output == NULL || fwrite(out.data, sizeof(float), n, output) != n ||
        fwrite(out.lse, sizeof(float), q_rows, output) != q_rows || fclose(output) != 0)
      stop("the output can't be written");
  }
  for (int i = 0; i < 2; ++i) {
    free((void *)segments[i].k);
    free((void *)segments[i].v);
  }
  free(q), free(k), free(v), free(state.ms), free(state.acc), free(out.data), free(out.lse);
  return 0;
}
