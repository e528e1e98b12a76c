// Products in bf16 of many query rows with keys, and of their weights with values (bf16_kernels.h).
//
// Instructions multiply pairs: a lane of the sums gains a0 * b0 + a1 * b1. A pair of a row's
// numbers is broadcast, panels are loaded as they lie, and R rows by P panels of sums stay in
// registers. An element of the result is added up in the order of its pairs, whichever tile it was
// computed in, so that a row gets the same bits however many come with it.
//
// bf16_<isa>.h adds to the vocabulary of vocabulary/common.h:
//
//   kProductRows, kProductPanels   rows and panels whose sums fit in the registers
//   round_side_by_side(a, b)       2 * kLanes bf16: those of a, then those of b
//   round_interleaved(a, b)        a lane of a, the same of b, the next of a, ...
//   add_pair_products(s, a, b)     s gains, lane by lane, the two products of bf16
//   pairs_of_ones, store_i32

constexpr int kPanelVectors = kPanelColumns / kLanes;

/// Pair i of a row, in every lane.
MIXEDKV_INLINE i32v broadcast_pair(const bf16_t *row, int i) {
  int32_t pair;
  memcpy(&pair, row + 2 * i, sizeof pair);
  return set1_i32(pair);
}

/// R rows by P panels; of the one panel only the first n columns where Partial.
template <int R, int P, bool Partial>
MIXEDKV_INLINE void panel_products(const bf16_t *a, size_t ld_a, const bf16_t *panels,
                                   size_t ld_panel, int num_pairs, int n, bool add_to_c, float *c,
                                   size_t ld_c) {
  constexpr int C = P * kPanelVectors;
  f32v sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < C; ++v)
      sum[r][v] = zero();
  const bf16_t *panel[P];
  for (int p = 0; p < P; ++p)
    panel[p] = panels + static_cast<size_t>(p) * ld_panel;
  for (int i = 0; i < num_pairs; ++i) {
    i32v b[C];
    for (int v = 0; v < C; ++v)
      b[v] = load_i32(panel[v / kPanelVectors] + i * 2 * kPanelColumns +
                      v % kPanelVectors * 2 * kLanes);
    for (int r = 0; r < R; ++r) {
      const i32v pair = broadcast_pair(a + at(r, ld_a, 0), i);
      for (int v = 0; v < C; ++v)
        sum[r][v] = add_pair_products(sum[r][v], pair, b[v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < C; ++v) {
      float *to = c + at(r, ld_c, v * kLanes);
      const int lanes = n - v * kLanes;
      if (!Partial || lanes >= kLanes)
        store(to, add_to_c ? add(load(to), sum[r][v]) : sum[r][v]);
      else if (lanes > 0)
        store_n(to, add_to_c ? add(load_n(to, lanes), sum[r][v]) : sum[r][v], lanes);
    }
}

template <int P, bool Partial, int R = kProductRows>
MIXEDKV_INLINE void row_products(int num_rows, const bf16_t *a, size_t ld_a, const bf16_t *panels,
                                 size_t ld_panel, int num_pairs, int n, bool add_to_c, float *c,
                                 size_t ld_c) {
  if constexpr (R > 1)
    if (num_rows < R)
      return row_products<P, Partial, R - 1>(num_rows, a, ld_a, panels, ld_panel, num_pairs, n,
                                             add_to_c, c, ld_c);
  panel_products<R, P, Partial>(a, ld_a, panels, ld_panel, num_pairs, n, add_to_c, c, ld_c);
}

/// All rows by P panels: these stay in the first-level cache from group to group of rows.
template <int P, bool Partial>
void product_columns(const bf16_t *a, size_t ld_a, int num_rows, const bf16_t *panels,
                     size_t ld_panel, int num_pairs, int n, bool add_to_c, float *c,
                     size_t ld_c) noexcept {
  for (int r = 0; r < num_rows; r += kProductRows)
    row_products<P, Partial>(num_rows - r < kProductRows ? num_rows - r : kProductRows,
                             a + at(r, ld_a, 0), ld_a, panels, ld_panel, num_pairs, n, add_to_c,
                             c + at(r, ld_c, 0), ld_c);
}

void bf16_product(const bf16_t *a, size_t ld_a, int num_rows, const bf16_t *panels, size_t ld_panel,
                  int num_pairs, int num_columns, bool add_to_c, float *c, size_t ld_c) noexcept {
  int j = 0;
  for (; j + kProductPanels * kPanelColumns <= num_columns; j += kProductPanels * kPanelColumns)
    product_columns<kProductPanels, false>(
        a, ld_a, num_rows, panels + static_cast<size_t>(j / kPanelColumns) * ld_panel, ld_panel,
        num_pairs, 0, add_to_c, c + j, ld_c);
  if constexpr (kProductPanels > 1)
    for (; j + kPanelColumns <= num_columns; j += kPanelColumns)
      product_columns<1, false>(a, ld_a, num_rows,
                                panels + static_cast<size_t>(j / kPanelColumns) * ld_panel,
                                ld_panel, num_pairs, 0, add_to_c, c + j, ld_c);
  if (j < num_columns)
    product_columns<1, true>(a, ld_a, num_rows,
                             panels + static_cast<size_t>(j / kPanelColumns) * ld_panel, ld_panel,
                             num_pairs, num_columns - j, add_to_c, c + j, ld_c);
}

// --- rows and weights --------------------------------------------------------------------------

/// n <= kLanes values, zeros beyond; none where n <= 0.
template <typename T> MIXEDKV_INLINE f32v load_some(const T *x, int n) {
  return n >= kLanes ? load(x) : n > 0 ? load_n(x, n) : zero();
}

void bf16_round_row(const float *x, bf16_t *y, size_t n) noexcept {
  size_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    store_i32(y + i, round_side_by_side(load(x + i), load(x + i + kLanes)));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    bf16_t tail[2 * kLanes];
    store_i32(tail,
              round_side_by_side(load_some(x + i, rest), load_some(x + i + kLanes, rest - kLanes)));
    memcpy(y + i, tail, static_cast<size_t>(rest + rest % 2) * sizeof(bf16_t));
  }
}

/// exp(x) = 2^n * 2^f with n the nearest integer to x / ln 2; a polynomial of degree 4 gives 2^f to
/// 3e-6 relative (its first coefficient is 1, so that exp(0) is), far below what rounding to bf16
/// costs.
MIXEDKV_INLINE f32v coarse_exp_of_difference(f32v x, f32v m) {
  const f32v t = mul(sub(x, m), set1(1.44269504f));
  const f32v n = rint(t);
  const f32v f = sub(t, n);
  f32v poly = fma(set1(9.582853e-3f), f, set1(5.590643e-2f));
  poly = fma(poly, f, set1(0.24024099f));
  poly = fma(poly, f, set1(0.6931242f));
  poly = fma(poly, f, set1(1.0f));
  // Below 2^-126 all is zero; -inf, whose f is NaN, too.
  return select_below(t, set1(-126.0f), zero(), scale_by_power(poly, n));
}

float bf16_exp_sum(const float *x, bf16_t *p, size_t n, float m) noexcept {
  const f32v max = set1(m);
  const i32v ones = pairs_of_ones();
  f32v sum = zero();
  size_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const i32v pairs = round_side_by_side(coarse_exp_of_difference(load(x + i), max),
                                          coarse_exp_of_difference(load(x + i + kLanes), max));
    store_i32(p + i, pairs);
    sum = add_pair_products(sum, pairs, ones);
  }
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    const float nothing = -INFINITY;
    const f32v a = rest >= kLanes ? load(x + i) : load_n(x + i, rest, nothing);
    const f32v b = rest > kLanes ? load_n(x + i + kLanes, rest - kLanes, nothing) : set1(nothing);
    const i32v pairs =
        round_side_by_side(coarse_exp_of_difference(a, max), coarse_exp_of_difference(b, max));
    store_i32(p + i, pairs);
    sum = add_pair_products(sum, pairs, ones);
  }
  return sum_lanes(sum);
}

bool bf16_all_finite(const bf16_t *x, size_t n) noexcept {
  constexpr size_t kStep = 2 * kLanes;
  size_t i = 0;
  bool finite = true;
  for (; i + kStep <= n; i += kStep) {
    // Seen as f32, a word is finite where its upper half is; the lower half is shifted up.
    const i32v pairs = load_i32(x + i);
    finite &=
        !any_not_finite(bits_as_f32(pairs)) && !any_not_finite(bits_as_f32(shift_left<16>(pairs)));
  }
  for (; i < n; ++i)
    finite &= (x[i].bits & 0x7f80u) != 0x7f80u;
  return finite;
}

// --- panels ------------------------------------------------------------------------------------

/// Dims that rows are unpacked of at a time where they are not read as they lie: sixteen rows of
/// them fit on the stack whatever head_dim is.
constexpr int kPanelStretch = 128;

/// n dims of num_keys rows into the panel: words of two dims, transposed.
template <typename T>
MIXEDKV_INLINE void key_words(const T *const (&rows)[kPanelColumns], int num_keys, int n,
                              bf16_t *panel) {
  for (int i = 0; i < n; i += 2 * kLanes)
    for (int j = 0; j < kPanelColumns; j += kLanes) {
      f32v x[kLanes];
      for (int l = 0; l < kLanes; ++l)
        x[l] = j + l < num_keys ? bits_as_f32(round_side_by_side(
                                      load_some(rows[j + l] + i, n - i),
                                      load_some(rows[j + l] + i + kLanes, n - i - kLanes)))
                                : zero();
      transpose(x);
      for (int l = 0; l < kLanes && i + 2 * l < n; ++l)
        store_i32(panel + (i / 2 + l) * 2 * kPanelColumns + 2 * j, f32_as_bits(x[l]));
    }
}

template <typename T>
void bf16_key_panel(const Rows *k, int num_keys, int head_dim, bf16_t *panel) noexcept {
  if constexpr (!is_blocks<T>) {
    const T *rows[kPanelColumns];
    for (int j = 0; j < kPanelColumns; ++j)
      rows[j] = row_at<T>(*k, j < num_keys ? j : 0);
    key_words(rows, num_keys, head_dim, panel);
  } else {
    alignas(64) float unpacked[kPanelColumns][kPanelStretch];
    const float *rows[kPanelColumns];
    for (int j = 0; j < kPanelColumns; ++j)
      rows[j] = unpacked[j];
    for (int begin = 0; begin < head_dim; begin += kPanelStretch) {
      const int n = head_dim - begin < kPanelStretch ? head_dim - begin : kPanelStretch;
      for (int j = 0; j < num_keys; ++j)
        unpack_row(from_dim(row_at<T>(*k, j), begin), unpacked[j], n);
      key_words(rows, num_keys, n, panel + begin * kPanelColumns);
    }
  }
}

/// n dims of two rows, the second one null where there is none, into pair `pair` of the panels.
template <typename T>
MIXEDKV_INLINE void value_words(const T *first, const T *second, int n, bf16_t *panels,
                                size_t ld_panel) {
  for (int i = 0; i < n; i += kPanelColumns, panels += ld_panel)
    for (int v = 0; v < kPanelColumns; v += kLanes)
      store_i32(panels + 2 * v,
                round_interleaved(load_some(first + i + v, n - i - v),
                                  second ? load_some(second + i + v, n - i - v) : zero()));
}

template <typename T>
void bf16_value_panels(const Rows *v, int num_keys, int head_dim_v, bf16_t *panels,
                       size_t ld_panel) noexcept {
  if constexpr (!is_blocks<T>) {
    for (int j = 0; j < num_keys; j += 2, panels += 2 * kPanelColumns)
      value_words(row_at<T>(*v, j), j + 1 < num_keys ? row_at<T>(*v, j + 1) : nullptr, head_dim_v,
                  panels, ld_panel);
  } else {
    alignas(64) float rows[2][kPanelStretch];
    for (int j = 0; j < num_keys; j += 2, panels += 2 * kPanelColumns)
      for (int begin = 0; begin < head_dim_v; begin += kPanelStretch) {
        const int n = head_dim_v - begin < kPanelStretch ? head_dim_v - begin : kPanelStretch;
        const bool two = j + 1 < num_keys;
        for (int k = 0; k < 1 + two; ++k)
          unpack_row(from_dim(row_at<T>(*v, j + k), begin), rows[k], n);
        value_words<float>(rows[0], two ? rows[1] : nullptr, n,
                           panels + static_cast<size_t>(begin / kPanelColumns) * ld_panel,
                           ld_panel);
      }
  }
}

const Bf16Kernels bf16_kernels = {bf16_round_row, bf16_exp_sum, bf16_all_finite, bf16_product};
