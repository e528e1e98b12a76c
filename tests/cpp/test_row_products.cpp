// qk and pv over rows of every format, of every instruction set that this machine can run, against
// float64 with bounds that follow from the number of roundings. Rows lie dense, strided or indexed,
// outputs between guard bytes, inputs end where their allocation ends.
//
// Usage: test_row_products [part of a check's name]

#include "adversarial_blocks.h"
#include "kernel_cases.h"

using namespace mixedkv;
using namespace testing;

namespace {

/// By definition: value i of a row of blocks.
double value_in_blocks(Format type, const char *row, int i) {
  if (type == Format::q4_0)
    return value_of_q4(reinterpret_cast<const block_q4_0 *>(row)[i / 32], i % 32);
  if (type == Format::iq4_nl) {
    const block_iq4_nl &block = reinterpret_cast<const block_iq4_nl *>(row)[i / 32];
    const int q = i % 32 < 16 ? block.qs[i % 32] & 15 : block.qs[i % 32 - 16] >> 4;
    return kLevels[q] * value_of_half(block.d);
  }
  if (type == Format::nl4) {
    static const int levels[16] = {-111, -88, -70, -55, -41, -28, -16, -5,
                                   6,    17,  29,  42,  56,  73,  94,  127};
    const block_nl4 &block = reinterpret_cast<const block_nl4 *>(row)[i / 64];
    const std::uint8_t byte = block.qs[i % 64 / 32 * 16 + i % 16];
    return levels[i % 32 < 16 ? byte & 15 : byte >> 4] * value_of_half(block.d);
  }
  if (type == Format::nl3) {
    static const int levels[8] = {-104, -65, -34, -8, 17, 44, 76, 127};
    const block_nl3 &block = reinterpret_cast<const block_nl3 *>(row)[i / 32];
    const int j = i % 16, shift = i % 32 / 16 * 4;
    int q = 0;
    if (j < 12)
      q = block.qs[j] >> shift & 7;
    else
      for (int bit = 0; bit < 3; ++bit)
        q |= (block.qs[4 * bit + j - 12] >> (shift + 3) & 1) << bit;
    return levels[q] * value_of_half(block.d);
  }
  const block_q8_0 &block = reinterpret_cast<const block_q8_0 *>(row)[i / 32];
  return block.qs[i % 32] * value_of_half(block.d);
}

/// num rows of a type: dense, with gaps between them, or picked in random order from more.
struct RowSet {
  Format type;
  int num, dim;
  std::ptrdiff_t stride;
  std::vector<std::int32_t> index;
  std::unique_ptr<Input<char>> bytes;
  std::vector<double> values; ///< [num, dim], in the order in which the kernel sees them

  RowSet(Random &random, Format row_type, int num_rows, int row_dim, Order order,
         const Kernels &scalar)
      : type(row_type), num(num_rows), dim(row_dim) {
    const std::size_t size = row_bytes(type, static_cast<std::size_t>(dim));
    const std::size_t element = type == Format::f32 ? 4 : 2;
    stride = static_cast<std::ptrdiff_t>(size + (order == Order::dense ? 0 : 3 * element));
    const int stored = order == Order::indexed ? 2 * num + 1 : num;
    // The allocation ends with the last row's last byte.
    bytes.reset(new Input<char>(
        static_cast<std::size_t>(stride) * static_cast<std::size_t>(stored - 1) + size,
        element * static_cast<std::size_t>(between(random, 0, 3))));
    std::vector<double> all(static_cast<std::size_t>(stored * dim));
    std::vector<float> x(static_cast<std::size_t>(dim));
    std::memset(bytes->data(), 0xff, bytes->size()); // NaN between rows
    for (int j = 0; j < stored; ++j) {
      for (float &value : x)
        value = normal(random);
      char *row = bytes->data() + stride * j;
      double *exact = all.data() + j * dim;
      if (type == Format::f32) {
        std::memcpy(row, x.data(), size);
        std::copy(x.begin(), x.end(), exact);
      } else if (type == Format::f16) {
        f16_t *halves = reinterpret_cast<f16_t *>(row);
        scalar.of(Format::f16).from_f32(x.data(), halves, x.size());
        for (int i = 0; i < dim; ++i)
          exact[i] = value_of_half(halves[i]);
      } else if (type == Format::bf16) {
        bf16_t *numbers = reinterpret_cast<bf16_t *>(row);
        scalar.of(type).from_f32(x.data(), numbers, x.size());
        for (int i = 0; i < dim; ++i)
          exact[i] = float_of(static_cast<std::uint32_t>(numbers[i].bits) << 16);
      } else {
        scalar.of(type).from_f32(x.data(), row, x.size());
        for (int i = 0; i < dim; ++i)
          exact[i] = value_in_blocks(type, row, i);
      }
    }
    for (int j = 0; j < num; ++j) {
      const int row = order == Order::indexed ? between(random, 0, stored - 1) : j;
      if (order == Order::indexed)
        index.push_back(row);
      values.insert(values.end(), all.begin() + row * dim, all.begin() + (row + 1) * dim);
    }
  }
  Rows rows() const { return {bytes->data(), stride, index.empty() ? nullptr : index.data()}; }
  const double *row(int j) const { return values.data() + j * dim; }
};

/// What rounding a query to the two 8-bit terms of neon_dotprod and its kin may add to a score:
/// half a step of 1/254 of the block's scale (its largest magnitude / 127) for each value, and the
/// roundings of the split itself, which are below one part in a hundred of it.
double split_error(const float *q, const double *k, int dim) {
  double error = 0;
  for (int b = 0; b < dim; b += 32) {
    double largest = 0, sum = 0;
    for (int i = b; i < b + 32; ++i) {
      largest = std::max(largest, std::fabs(static_cast<double>(q[i])));
      sum += std::fabs(k[i]);
    }
    error += 1.01 * largest / 127 * (0.5 / 254) * sum;
  }
  return error;
}

void check_qk(const std::string &isa, const Kernels &kernels, const Kernels &scalar, Random &random,
              Format type, int num_rows, int num_keys, int dim, Order order) {
  const RowSet keys(random, type, num_keys, dim, order, scalar);
  const Rows rows = keys.rows();
  const std::size_t ld_q = static_cast<std::size_t>(dim + between(random, 0, 5));
  const std::size_t ld_scores = static_cast<std::size_t>(num_keys + between(random, 0, 5));
  const std::size_t n = static_cast<std::size_t>(num_rows);
  const std::size_t misalignment = static_cast<std::size_t>(between(random, 0, 3));
  Input<float> q((n - 1) * ld_q + static_cast<std::size_t>(dim), misalignment);
  std::fill(q.data(), q.data() + q.size(), kNan);
  for (std::size_t r = 0; r < n; ++r)
    for (int i = 0; i < dim; ++i)
      q[r * ld_q + static_cast<std::size_t>(i)] = normal(random);
  Output<float> scores((n - 1) * ld_scores + static_cast<std::size_t>(num_keys), misalignment);
  std::fill(scores.data(), scores.data() + scores.size(), 12345.0f);
  const auto qk = kernels.of(type).qk;
  qk(q.data(), ld_q, num_rows, &rows, num_keys, dim, scores.data(), ld_scores);
  EXPECT(scores.guards_intact(), "guards: rows %d keys %d dim %d", num_rows, num_keys, dim);
  // All NEON variants but the plain one.
  const bool split = isa.rfind("neon_", 0) == 0 && type == Format::q4_0;
  std::vector<float> alone(static_cast<std::size_t>(num_keys));
  for (std::size_t r = 0; r < n; ++r) {
    const float *row = q.data() + r * ld_q;
    qk(row, ld_q, 1, &rows, num_keys, dim, alone.data(), alone.size());
    for (int j = 0; j < num_keys; ++j) {
      const double *k = keys.row(j);
      double expected = 0, magnitude = 0;
      for (int i = 0; i < dim; ++i) {
        expected += row[i] * k[i];
        magnitude += std::fabs(row[i] * k[i]);
      }
      // A sum of dim products, each rounded at most dim times.
      const double bound = dim * kUlp * magnitude + (split ? split_error(row, k, dim) : 0.0);
      const float got = scores[r * ld_scores + static_cast<std::size_t>(j)];
      EXPECT(std::fabs(got - expected) <= bound,
             "rows %d keys %d dim %d: row %zu key %d: %.9g, not %.9g, bound %.3g", num_rows,
             num_keys, dim, r, j, static_cast<double>(got), expected, bound);
      EXPECT(bits_of(got) == bits_of(alone[static_cast<std::size_t>(j)]),
             "rows %d keys %d dim %d: row %zu key %d has other bits than alone", num_rows, num_keys,
             dim, r, j);
    }
    for (std::size_t j = static_cast<std::size_t>(num_keys); r + 1 < n && j < ld_scores; ++j)
      EXPECT(scores[r * ld_scores + j] == 12345.0f, "wrote between rows");
  }
}

void check_pv(const Kernels &kernels, const Kernels &scalar, Random &random, Format type,
              int num_rows, int num_keys, int dim, Order order) {
  const RowSet values(random, type, num_keys, dim, order, scalar);
  const Rows rows = values.rows();
  const std::size_t ld_p = static_cast<std::size_t>(num_keys + between(random, 0, 5));
  const std::size_t ld_acc = static_cast<std::size_t>(dim + between(random, 0, 5));
  const std::size_t n = static_cast<std::size_t>(num_rows);
  const std::size_t misalignment = static_cast<std::size_t>(between(random, 0, 3));
  Input<float> p((n - 1) * ld_p + static_cast<std::size_t>(num_keys), misalignment);
  std::fill(p.data(), p.data() + p.size(), kNan);
  for (std::size_t r = 0; r < n; ++r)
    for (int j = 0; j < num_keys; ++j)
      p[r * ld_p + static_cast<std::size_t>(j)] = std::exp(-std::fabs(normal(random)));
  Output<float> acc((n - 1) * ld_acc + static_cast<std::size_t>(dim), misalignment);
  for (std::size_t i = 0; i < acc.size(); ++i)
    acc[i] = normal(random);
  const std::vector<float> before(acc.data(), acc.data() + acc.size());
  const auto pv = kernels.of(type).pv;
  pv(p.data(), ld_p, num_rows, &rows, num_keys, dim, acc.data(), ld_acc);
  EXPECT(acc.guards_intact(), "guards: rows %d keys %d dim %d", num_rows, num_keys, dim);

  // The same run in two parts, one row at a time, cut where a sum ends: sums ascend over keys, so
  // not a bit may differ.
  std::vector<float> parts = before;
  const int cut = between(random, 0, num_keys / kSumKeys) * kSumKeys;
  Rows second = rows;
  if (rows.index)
    second.index += cut;
  else
    second.base = static_cast<const char *>(rows.base) + rows.stride * cut;
  for (std::size_t r = 0; r < n; ++r) {
    pv(p.data() + r * ld_p, ld_p, 1, &rows, cut, dim, parts.data() + r * ld_acc, ld_acc);
    pv(p.data() + r * ld_p + cut, ld_p, 1, &second, num_keys - cut, dim, parts.data() + r * ld_acc,
       ld_acc);
  }
  for (std::size_t r = 0; r < n; ++r)
    for (std::size_t i = 0; i < ld_acc && r * ld_acc + i < acc.size(); ++i) {
      const std::size_t at = r * ld_acc + i;
      if (i >= static_cast<std::size_t>(dim)) {
        EXPECT(acc[at] == before[at], "wrote between rows");
        continue;
      }
      double expected = before[at], magnitude = std::fabs(expected);
      for (int j = 0; j < num_keys; ++j) {
        const double product = p[r * ld_p + static_cast<std::size_t>(j)] * values.row(j)[i];
        expected += product;
        magnitude += std::fabs(product);
      }
      const double bound = (num_keys + 1) * kUlp * magnitude;
      EXPECT(std::fabs(acc[at] - expected) <= bound,
             "rows %d keys %d dim %d: row %zu dim %zu: %.9g, not %.9g, bound %.3g", num_rows,
             num_keys, dim, r, i, static_cast<double>(acc[at]), expected, bound);
      EXPECT(bits_of(acc[at]) == bits_of(parts[at]),
             "rows %d keys %d dim %d: row %zu dim %zu: other bits when cut at %d", num_rows,
             num_keys, dim, r, i, cut);
    }
}

void test_attention(const std::string &isa, const Kernels &kernels, const Kernels &scalar) {
  for (int t = 0; t < kNumFormats; ++t) {
    const Format type = static_cast<Format>(t);
    const bool blocks = !format_info(type).plain();
    const std::string of_type = std::string(" ") + format_name(type);
    const auto fits = [&](int dim) { return format_info(type).holds(dim); };
    const auto sweep = [&](auto &&run) {
      Random random(11);
      for (int dim : {1, 4, 8, 17, 32, 64, 80, 96, 128, 256, 512, 544})
        for (int num_rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 33})
          if (fits(dim)) {
            // Every number of keys beside every order, in turn, to keep the sweep short.
            const int num_keys[] = {1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 24, 31, 66};
            const int which = between(random, 0, 14);
            run(random, num_rows, num_keys[which], dim, kOrders[between(random, 0, 2)]);
            run(random, num_rows, num_keys[(which + 5) % 15], dim, kOrders[(which + dim) % 3]);
          }
      for (int num_keys : {1, 3, 7, 8, 16, 17, 48, 130, 300})
        for (int num_rows : {1, 4, 9})
          for (Order order : kOrders)
            run(random, num_rows, num_keys, 64, order);
      // Many rows share values, whose sums then wait from part to part.
      for (int num_rows : {5, 12, 33, 130})
        if (fits(160))
          run(random, num_rows, 257, 160, kOrders[num_rows % 3]);
    };
    const auto fuzz = [&](auto &&run) {
      Random random(20240229);
      for (int i = 0; i < 150; ++i) {
        const int unit = format_info(type).block_values;
        const int dim = blocks ? unit * between(random, 1, 8) : between(random, 1, 200);
        run(random, between(random, 1, 12), between(random, 1, 40), dim,
            kOrders[between(random, 0, 2)]);
      }
    };
    const auto qk = [&](Random &random, int num_rows, int num_keys, int dim, Order order) {
      check_qk(isa, kernels, scalar, random, type, num_rows, num_keys, dim, order);
    };
    const auto pv = [&](Random &random, int num_rows, int num_keys, int dim, Order order) {
      check_pv(kernels, scalar, random, type, num_rows, num_keys, dim, order);
    };
    check(isa + " qk" + of_type + " shapes", [&] { sweep(qk); });
    check(isa + " qk" + of_type + " fuzz", [&] { fuzz(qk); });
    check(isa + " pv" + of_type + " shapes", [&] { sweep(pv); });
    check(isa + " pv" + of_type + " fuzz", [&] { fuzz(pv); });
    check(isa + " qk and pv" + of_type + " without keys or rows touch nothing", [&] {
      const Rows none = {nullptr, 0, nullptr};
      float q[32] = {0}, out[32];
      std::fill(out, out + 32, 5.0f);
      const auto qk_fn = kernels.of(type).qk;
      const auto pv_fn = kernels.of(type).pv;
      qk_fn(q, 32, 1, &none, 0, 32, out, 1);
      pv_fn(q, 0, 1, &none, 0, 32, out, 32);
      qk_fn(q, 32, 0, &none, 0, 32, out, 1);
      pv_fn(q, 0, 0, &none, 0, 32, out, 32);
      for (float x : out)
        EXPECT(x == 5.0f, "%g", static_cast<double>(x));
    });
    check(isa + " qk" + of_type + " NaN and infinity reach only their row and key", [&] {
      Random random(13);
      for (int num_rows : {1, 3, 8})
        for (float bad : {kNan, kInf}) {
          const int num_keys = 11, dim = 64;
          RowSet keys(random, type, num_keys, dim, Order::dense, scalar);
          const Rows rows = keys.rows();
          std::vector<float> q(static_cast<std::size_t>(num_rows * dim));
          for (float &x : q)
            x = normal(random);
          const int bad_row = num_rows / 2, bad_key = 6;
          q[static_cast<std::size_t>(bad_row * dim + 40)] = bad;
          char *key = keys.bytes->data() + keys.stride * bad_key;
          const f16_t bad_half = std::isnan(bad) ? 0x7e00 : 0x7c00;
          if (type == Format::f32)
            std::memcpy(key + 4, &bad, 4);
          else if (type == Format::bf16)
            scalar.of(type).from_f32(&bad, key, 1);
          else // a value, or the block's d
            std::memcpy(key, &bad_half, 2);
          std::vector<float> scores(static_cast<std::size_t>(num_rows * num_keys));
          kernels.of(type).qk(q.data(), dim, num_rows, &rows, num_keys, dim, scores.data(),
                              num_keys);
          for (int r = 0; r < num_rows; ++r)
            for (int j = 0; j < num_keys; ++j) {
              const float score = scores[static_cast<std::size_t>(r * num_keys + j)];
              EXPECT(std::isfinite(score) == (r != bad_row && j != bad_key), "row %d key %d: %g", r,
                     j, static_cast<double>(score));
            }
        }
    });
    if (blocks)
      check(isa + " pv" + of_type + " gives the bits that f32 gives on dequantized rows", [&] {
        // The same values in the same order: not a bit of rounding is left to tell apart.
        Random random(17);
        const int num_keys = 40, dim = 128, num_rows = 4;
        const RowSet keys(random, type, num_keys, dim, Order::dense, scalar);
        std::vector<float> unpacked(static_cast<std::size_t>(num_keys * dim));
        const Rows quantized = keys.rows();
        kernels.of(type).to_f32(quantized.base, unpacked.data(), unpacked.size());
        for (std::size_t i = 0; i < unpacked.size(); ++i)
          EXPECT(static_cast<double>(unpacked[i]) == keys.values[i], "value %zu", i);
        std::vector<float> p(static_cast<std::size_t>(num_rows * num_keys));
        for (float &x : p)
          x = std::fabs(normal(random));
        const Rows plain = {unpacked.data(), dim * 4, nullptr};
        std::vector<float> a(static_cast<std::size_t>(num_rows * dim), 0.0f), b = a;
        kernels.of(type).pv(p.data(), num_keys, num_rows, &quantized, num_keys, dim, a.data(), dim);
        kernels.of(Format::f32)
            .pv(p.data(), num_keys, num_rows, &plain, num_keys, dim, b.data(), dim);
        EXPECT(a == b, "some elements differ");
      });
  }
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  const Kernels &scalar = kernels_for("scalar");
  on_each_isa([&](const std::string &isa, const Kernels &kernels) {
    test_attention(isa, kernels, scalar);
  });
  return summary();
}
