// The scale of a block of levels (formats/levels.h) by least squared error, in integers, so that
// every instruction set finds the same.
//
// A lane is a block here, and halves of a lane are two of its values that follow one another, as
// integers X of 16 bits, 32767 for the block's largest magnitude. A candidate multiplies them by m
// / 32768, rounded to the nearest byte, halves up, beyond the range of bytes to its ends; each
// byte takes the level c nearest to it. Of what candidates there are, the first one with the
// largest <X, c>^2 / <c, c> has the least squared error once d = <X, c> / <c, c>; sums are exact,
// and these few steps are each rounded to f32.
//
// A format says in a struct L:
//
//   Block, kValues        the block, and its values, 32 or 64
//   kTable                a LevelTable, constexpr
//   kMultipliers          the m of either sign, constexpr; +m comes before -m
//   kWords                32-bit words of a block's codes
//   arrange(nibbles)      words of nibbles, of 32 values each as Q4_0 has them, to the block's
//   words

/// Levels' numbers of bytes.
template <typename L> MIXEDKV_INLINE i32v level_numbers(i32v y) {
  const i32v h = high_nibbles(xor_i32(y, set1_i32(static_cast<int32_t>(0x80808080u))));
  const i32v one = count_above(look_up(load_table(L::kTable.first), h), y,
                               look_up(load_table(L::kTable.above[0]), h));
  return count_above(one, y, look_up(load_table(L::kTable.above[1]), h));
}

/// count <= kLanes blocks: y[i] from the values, f32 or f16, at source(i).
template <typename L, typename F>
MIXEDKV_INLINE void search_levels(F source, int count, typename L::Block *y) {
  constexpr int kHalves = L::kValues / 2;
  f32v top = zero(); // the largest magnitude, and NaN where a value is
  i32v x[kHalves];
  {
    f32v values[L::kValues]; // lanes without a block repeat the last one's
    f32v part[kLanes];
    for (int first = 0; first < L::kValues; first += kLanes) {
      for (int b = 0; b < kLanes; ++b)
        part[b] = load(source(b < count ? b : count - 1) + first);
      transpose(part);
      for (int i = 0; i < kLanes; ++i) {
        values[first + i] = part[i];
        top = max_bits(top, abs_of(part[i]));
      }
    }
    const f32v smallest = set1(1e-30f); // what can't be inverted is a block of zeros
    const f32v inverse = select_below(top, smallest, zero(), div(set1(32767.0f), top));
    for (int k = 0; k < kHalves; ++k) {
      const i32v low = to_i32(mul(values[2 * k], inverse));
      const i32v high = to_i32(mul(values[2 * k + 1], inverse));
      x[k] = add_i32(and_i32(low, set1_i32(0xffff)), shift_left<16>(high));
    }
  }
  const i32v levels = load_table(L::kTable.bytes[0]);
  f32v best = set1(-1.0f), of_best = zero();
  for (int candidate = 0; candidate < 2 * static_cast<int>(sizeof L::kMultipliers); ++candidate) {
    const int m = L::kMultipliers[candidate / 2];
    const int signed_m = candidate % 2 ? -m : m;
    const i32v multiplier = set1_halves(signed_m);
    i32v products = zero_i32(), squares = zero_i32();
    for (int k = 0; k < kHalves; k += 2) {
      const i32v bytes = narrow(scale_halves(x[k], multiplier), scale_halves(x[k + 1], multiplier));
      const i32v c = look_up(levels, level_numbers<L>(bytes));
      const i32v low = widen_low(c), high = widen_high(c);
      products = madd16(madd16(products, x[k], low), x[k + 1], high);
      squares = madd16(madd16(squares, low, low), high, high);
    }
    const f32v p = to_f32(products);
    const f32v score = div(mul(p, p), to_f32(squares));
    of_best = select_below(best, score, set1(static_cast<float>(signed_m)), of_best);
    best = select_below(best, score, score, best);
  }

  const i32v m = to_i32(of_best);
  const i32v multiplier = add_i32(and_i32(m, set1_i32(0xffff)), shift_left<16>(m));
  i32v products = zero_i32(), squares = zero_i32();
  i32v numbers[kHalves];
  for (int k = 0; k < kHalves; k += 2) {
    const i32v q = level_numbers<L>(
        narrow(scale_halves(x[k], multiplier), scale_halves(x[k + 1], multiplier)));
    const i32v c = look_up(levels, q);
    const i32v low = widen_low(c), high = widen_high(c);
    products = madd16(madd16(products, x[k], low), x[k + 1], high);
    squares = madd16(madd16(squares, low, low), high, high);
    numbers[k] = widen_low(q);
    numbers[k + 1] = widen_high(q);
  }
  // Where all levels are zero, so is the sum of products.
  const f32v divisor = max_or_second(to_f32(squares), set1(1.0f));
  f16_t scales[kLanes];
  store(scales, mul(div(to_f32(products), divisor),
                    mul(div(top, set1(32767.0f)), set1(L::kLevelsPerUnit))));

  // Words of four bytes, of which each holds values j and j + 16 of its 32.
  i32v words[L::kValues / 8];
  for (int w = 0; w < L::kValues / 8; ++w) {
    i32v two[2];
    for (int i = 0; i < 2; ++i) {
      const int k = w / 4 * 16 + w % 4 * 2 + i;
      const i32v both = add_i32(numbers[k], shift_left<4>(numbers[k + 8]));
      two[i] = and_i32(add_i32(both, shift_right_signed<8>(both)), set1_i32(0xffff));
    }
    words[w] = add_i32(two[0], shift_left<16>(two[1]));
  }
  L::arrange(words);
  alignas(64) int32_t codes[L::kWords][kLanes];
  for (int w = 0; w < L::kWords; ++w)
    store_i32(codes[w], words[w]);
  float tops[kLanes];
  store(tops, top);
  for (int b = 0; b < count; ++b) {
    y[b].d = scales[b];
    for (int w = 0; w < L::kWords; ++w)
      memcpy(y[b].qs + 4 * w, &codes[w][b], 4);
    if ((bits_of(tops[b]) & 0x7f800000u) == 0x7f800000u) {
      y[b].d = 0x7e00u;
      memset(y[b].qs, 0, sizeof y[b].qs);
    }
  }
}
