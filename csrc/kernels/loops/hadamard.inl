// The normalised Walsh-Hadamard transform, in place, block after block. In the vocabulary of
// vocabulary/common.h.
//
// Values are scaled, then come sums and differences of pairs h = 1, 2, 4, ... apart, smallest
// first: one rounding each, the same on every instruction set and as in scalar/hadamard.inl.

/// 1 in the lanes whose number lacks bit H, -1 in the others.
template <int H> MIXEDKV_INLINE f32v hadamard_signs() {
  alignas(64) static constexpr float signs[4][16] = {
      {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
      {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
      {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
      {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1},
  };
  return load(signs[H == 1 ? 0 : H == 2 ? 1 : H == 4 ? 2 : 3]);
}

/// Pairs of lanes H apart: a product with 1 or -1 rounds nothing.
template <int H> MIXEDKV_INLINE f32v hadamard_lanes(f32v x) {
  if constexpr (H < kLanes)
    return hadamard_lanes<2 * H>(fma(x, hadamard_signs<H>(), swap_lanes<H>(x)));
  else
    return x;
}

/// Pairs of M vectors, 1, 2, ... M / 2 vectors apart.
template <int M> MIXEDKV_INLINE void hadamard_pairs(f32v *x) {
  for (int h = 1; h < M; h *= 2)
    for (int i = 0; i < M; ++i)
      if ((i & h) == 0) {
        const f32v a = x[i], b = x[i + h];
        x[i] = add(a, b);
        x[i + h] = sub(a, b);
      }
}

/// Vectors that are transformed among themselves in registers.
constexpr int kHadamardVectors = 8;

/// The first M * kLanes values of what follows, whole.
template <int M> MIXEDKV_INLINE void hadamard_first(float *x, f32v factor) {
  f32v v[M];
  for (int i = 0; i < M; ++i)
    v[i] = hadamard_lanes<1>(mul(load(x + i * kLanes), factor));
  hadamard_pairs<M>(v);
  for (int i = 0; i < M; ++i)
    store(x + i * kLanes, v[i]);
}

/// Runs of `run` values that are transformed become one, M at a time.
template <int M> MIXEDKV_INLINE void hadamard_join(float *x, size_t run) {
  for (size_t j = 0; j < run; j += kLanes) {
    f32v v[M];
    for (int i = 0; i < M; ++i)
      v[i] = load(x + j + static_cast<size_t>(i) * run);
    hadamard_pairs<M>(v);
    for (int i = 0; i < M; ++i)
      store(x + j + static_cast<size_t>(i) * run, v[i]);
  }
}

/// A block of kLanes values at least.
MIXEDKV_INLINE void hadamard_block(float *x, size_t n, f32v factor) {
  constexpr size_t whole = kHadamardVectors * kLanes;
  if (n < whole) {
    if (n == kLanes)
      hadamard_first<1>(x, factor);
    else if (n == 2 * kLanes)
      hadamard_first<2>(x, factor);
    else
      hadamard_first<4>(x, factor);
    return;
  }
  for (size_t i = 0; i < n; i += whole)
    hadamard_first<kHadamardVectors>(x + i, factor);
  for (size_t run = whole; run < n;) {
    const size_t m = n / run < kHadamardVectors ? n / run : kHadamardVectors;
    for (size_t i = 0; i < n; i += m * run) {
      if (m == 2)
        hadamard_join<2>(x + i, run);
      else if (m == 4)
        hadamard_join<4>(x + i, run);
      else
        hadamard_join<kHadamardVectors>(x + i, run);
    }
    run *= m;
  }
}

void hadamard(float *x, size_t n, size_t block) noexcept {
  if (block == 1)
    return;
  const float factor = static_cast<float>(1.0 / sqrt(static_cast<double>(block)));
  if (block >= kLanes) {
    for (size_t i = 0; i < n; i += block)
      hadamard_block(x + i, block, set1(factor));
    return;
  }
  for (size_t i = 0; i < n; ++i)
    x[i] *= factor;
  for (size_t h = 1; h < block; h *= 2)
    for (size_t i = 0; i < n; ++i)
      if ((i & h) == 0) {
        const float a = x[i], b = x[i + h];
        x[i] = a + b;
        x[i + h] = a - b;
      }
}
