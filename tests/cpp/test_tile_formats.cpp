// Token tiles of every format that has them, on every instruction set that this machine can run:
// packing, unpacking and panels against the scalar kernels, bit by bit; products against float64 on
// the values that the tiles stand for. Q4_0's own layout and edge cases:
// test_tile_{layout,keys,values}.cpp.
//
// Usage: test_tile_formats [part of a check's name]

#include "checks.h"
#include "formats/tile_layout.h"
#include "kernels/dispatch.h"

using namespace mixedkv;
using namespace testing;

namespace {

constexpr int kTokens = kTileTokens;

std::size_t size(int n) { return static_cast<std::size_t>(n); }
/// Values of a block, in which dims are counted here.
int unit(Format format) { return format_info(format).block_values; }

/// Rows of values and the tiles that scalar kernels pack them to.
struct Tiles {
  Format format;
  bool keys;
  int num, dim;
  std::vector<std::vector<float>> rows; ///< what was packed
  std::vector<unsigned char> bytes;
  std::vector<float> values; ///< [num * kTokens][dim], what it reads back as

  Tiles(Random &random, Format of, bool of_keys, int num_tiles, int row_dim)
      : format(of), keys(of_keys), num(num_tiles), dim(row_dim),
        bytes(tile_bytes(of, size(row_dim)) * size(num_tiles)) {
    const TileKernels &scalar = *kernels_for("scalar").tiles_of(format);
    for (int j = 0; j < num * kTokens; ++j) {
      rows.emplace_back(size(dim));
      const float magnitude = std::ldexp(1.0f, between(random, -3, 2));
      for (float &x : rows.back())
        x = magnitude * normal(random);
    }
    for (int t = 0; t < num; ++t) {
      const void *pointers[kTokens];
      for (int i = 0; i < kTokens; ++i)
        pointers[i] = rows[size(t * kTokens + i)].data();
      (keys ? scalar.pack_keys_f32 : scalar.pack_values_f32)(pointers, dim, tile(t));
    }
    read();
  }
  unsigned char *tile(int t) { return bytes.data() + tile_bytes(format, size(dim)) * size(t); }
  /// By the layout, and by what a row's blocks mean.
  void read() {
    const TileLayout &layout = *tile_layout(format);
    const int num_blocks = dim / unit(format);
    values.resize(size(num * kTokens * dim));
    std::vector<unsigned char> row(row_bytes(format, size(dim)));
    for (int j = 0; j < num * kTokens; ++j) {
      (keys ? layout.get_keys : layout.get_values)(tile(j / kTokens), num_blocks, j % kTokens, 0,
                                                   num_blocks, row.data());
      kernels_for("scalar").of(format).to_f32(row.data(), values.data() + j * dim, size(dim));
    }
  }
  Rows as_rows() {
    return {bytes.data(), static_cast<std::ptrdiff_t>(tile_bytes(format, size(dim))), nullptr};
  }
  const float *value(int j) const { return values.data() + j * dim; }
};

void test_layout(Format format) {
  const std::string name = format_name(format);
  for (bool keys : {true, false})
    check(name + (keys ? " keys" : " values") + ": tokens go into a tile and come back alone", [&] {
      Random random(1);
      const TileLayout &layout = *tile_layout(format);
      for (int num_blocks : {1, 2, 4, 9}) {
        const int dim = num_blocks * unit(format);
        std::vector<unsigned char> tile(tile_bytes(format, size(dim)));
        EXPECT(tile.size() == kTokens * row_bytes(format, size(dim)), "bytes, dim %d", dim);
        std::vector<std::vector<unsigned char>> rows(kTokens);
        for (int step = 0; step < 3 * kTokens; ++step) {
          const int token = step % kTokens;
          rows[size(token)].resize(row_bytes(format, size(dim)));
          for (unsigned char &byte : rows[size(token)])
            byte = static_cast<unsigned char>(random());
          (keys ? layout.put_keys : layout.put_values)(rows[size(token)].data(), 0, num_blocks,
                                                       num_blocks, tile.data(), token);
          for (int other = 0; other < kTokens && step >= kTokens; ++other) {
            std::vector<unsigned char> got(row_bytes(format, size(dim)));
            (keys ? layout.get_keys : layout.get_values)(tile.data(), num_blocks, other, 0,
                                                         num_blocks, got.data());
            EXPECT(got == rows[size(other)], "dim %d token %d", dim, other);
          }
        }
      }
    });
}

void test_conversion(const std::string &isa, const Kernels &kernels, Format format) {
  const std::string name = isa + " " + format_name(format);
  const TileKernels &scalar = *kernels_for("scalar").tiles_of(format);
  const TileKernels &tiles = *kernels.tiles_of(format);
  for (bool keys : {true, false}) {
    check(name + (keys ? " keys" : " values") + " are packed to the scalar bytes", [&] {
      Random random(2);
      for (int step = 0; step < 60; ++step) {
        const int dim = unit(format) * (1 + step % 5);
        const std::uint32_t seen = step % 3 ? 0xffffu : static_cast<std::uint32_t>(random());
        Tiles from(random, format, keys, 1, dim);
        std::vector<std::vector<f16_t>> halves;
        for (auto &row : from.rows) {
          if (step % 7 == 6)
            row[size(between(random, 0, dim - 1))] = kNan;
          halves.emplace_back(size(dim));
          kernels_for("scalar")
              .of(Format::f16)
              .from_f32(row.data(), halves.back().data(), size(dim));
        }
        const void *f32[kTokens], *f16[kTokens];
        for (int i = 0; i < kTokens; ++i) {
          f32[i] = seen >> i & 1u ? from.rows[size(i)].data() : nullptr;
          f16[i] = seen >> i & 1u ? halves[size(i)].data() : nullptr;
        }
        std::vector<unsigned char> want(from.bytes.size());
        for (unsigned char &byte : want)
          byte = static_cast<unsigned char>(random());
        std::vector<unsigned char> got = want;
        if (format_info(format).fits && step % 2 != 0) {
          (keys ? scalar.fit_keys_f32 : scalar.fit_values_f32)(f32, dim, want.data());
          (keys ? tiles.fit_keys_f32 : tiles.fit_values_f32)(f32, dim, got.data());
          EXPECT(got == want, "fitted, f32, dim %d tokens %x", dim, seen & 0xffffu);
          (keys ? scalar.fit_keys_f16 : scalar.fit_values_f16)(f16, dim, want.data());
          (keys ? tiles.fit_keys_f16 : tiles.fit_values_f16)(f16, dim, got.data());
          EXPECT(got == want, "fitted, f16, dim %d tokens %x", dim, seen & 0xffffu);
        }
        (keys ? scalar.pack_keys_f32 : scalar.pack_values_f32)(f32, dim, want.data());
        (keys ? tiles.pack_keys_f32 : tiles.pack_values_f32)(f32, dim, got.data());
        EXPECT(got == want, "f32, dim %d tokens %x", dim, seen & 0xffffu);
        (keys ? scalar.pack_keys_f16 : scalar.pack_values_f16)(f16, dim, want.data());
        (keys ? tiles.pack_keys_f16 : tiles.pack_values_f16)(f16, dim, got.data());
        EXPECT(got == want, "f16, dim %d tokens %x", dim, seen & 0xffffu);
      }
    });
    check(name + (keys ? " keys" : " values") + " are unpacked exactly", [&] {
      Random random(3);
      for (int dim = unit(format); dim <= 9 * unit(format); dim += unit(format)) {
        Tiles from(random, format, keys, 1, dim);
        for (unsigned char &byte : from.bytes)
          byte = static_cast<unsigned char>(random() & 0xbb); // any codes, finite scales
        from.read();
        Output<float> out(size(dim * kTokens), 3);
        (keys ? tiles.keys_to_f32 : tiles.values_to_f32)(from.tile(0), dim, out.data());
        EXPECT(out.guards_intact(), "guards, dim %d", dim);
        for (int j = 0; j < kTokens; ++j)
          for (int i = 0; i < dim; ++i)
            EXPECT(out[size(keys ? i * kTokens + j : j * dim + i)] == from.value(j)[i],
                   "dim %d token %d value %d", dim, j, i);
        if (keys ? tiles.key_panel == nullptr : tiles.value_panels == nullptr)
          continue;
        const std::size_t num_numbers =
            keys ? panel_size(size(dim / 2)) : panel_size(kTokens / 2) * size(dim / 16);
        std::vector<bf16_t> want(num_numbers), got(num_numbers);
        if (keys) {
          scalar.key_panel(from.tile(0), dim, want.data());
          tiles.key_panel(from.tile(0), dim, got.data());
        } else {
          scalar.value_panels(from.tile(0), dim, want.data(), panel_size(kTokens / 2));
          tiles.value_panels(from.tile(0), dim, got.data(), panel_size(kTokens / 2));
        }
        for (std::size_t i = 0; i < num_numbers; ++i)
          EXPECT(((got[i].bits ^ want[i].bits) & 0x7fff) == 0 ||
                     ((want[i].bits | got[i].bits) & 0x7f80) == 0,
                 "panel, dim %d number %zu: %04x, not %04x", dim, i, got[i].bits, want[i].bits);
      }
    });
  }
}

/// Scores of rows against all tokens of tiles.
std::vector<float> scores_of(const TileKernels &kernels, const std::vector<std::vector<float>> &q,
                             Tiles &tiles) {
  const std::size_t n = size(tiles.dim);
  const int num_rows = static_cast<int>(q.size());
  std::vector<float> flat, scores(q.size() * size(tiles.num * kTokens));
  for (const auto &row : q)
    flat.insert(flat.end(), row.begin(), row.end());
  std::vector<float> prepared(tile_query_floats(n) * q.size());
  kernels.prepare_query(flat.data(), n, num_rows, tiles.dim, prepared.data());
  const Rows rows = tiles.as_rows();
  kernels.qk(prepared.data(), num_rows, &rows, tiles.num, tiles.dim, scores.data(),
             size(tiles.num * kTokens));
  return scores;
}

void test_keys(const std::string &isa, const Kernels &kernels, Format format) {
  const TileKernels &of = *kernels.tiles_of(format);
  check(isa + " " + format_name(format) + " scores, of rows alone and together", [&] {
    Random random(4);
    for (int blocks : {1, 2, 4, 5, 16, 33})
      for (int num_rows = 1; num_rows <= 7; ++num_rows)
        for (int outlier = 0; outlier < 3; ++outlier) {
          const int dim = blocks * unit(format);
          Tiles keys(random, format, true, between(random, 1, 5), dim);
          std::vector<std::vector<float>> q(size(num_rows), std::vector<float>(size(dim)));
          for (auto &row : q)
            for (float &x : row)
              x = normal(random);
          if (outlier != 0) // of one row only: the others' bits must not change
            q[0][size(between(random, 0, dim - 1))] = outlier == 1 ? 300.0f : -1e4f;
          const std::vector<float> scores = scores_of(of, q, keys);
          const std::size_t n = size(keys.num * kTokens);
          for (int r = 0; r < num_rows; ++r) {
            const std::vector<float> alone = scores_of(of, {q[size(r)]}, keys);
            EXPECT(std::memcmp(alone.data(), scores.data() + size(r) * n, n * 4) == 0,
                   "dim %d rows %d: row %d has other bits than alone", dim, num_rows, r);
            for (std::size_t j = 0; j < n; ++j) {
              double want = 0, magnitude = 0, norm_k = 0, norm_q = 0;
              for (int i = 0; i < dim; ++i) {
                const double k = keys.value(static_cast<int>(j))[i], x = q[size(r)][size(i)];
                want += x * k;
                magnitude += std::fabs(x * k);
                norm_k += k * k;
                norm_q += x * x;
              }
              const double error = std::fabs(scores[size(r) * n + j] - want);
              const double typical =
                  outlier != 0 && r == 0 ? 2.5e-3 : 1e-4 * std::sqrt(norm_q * norm_k);
              EXPECT(error <= typical + (dim + 8) * kUlp * magnitude,
                     "dim %d rows %d row %d key %zu: off by %.3g", dim, num_rows, r, j, error);
            }
          }
        }
  });
}

void test_values(const std::string &isa, const Kernels &kernels, Format format) {
  const TileKernels &of = *kernels.tiles_of(format);
  const auto run = [&](const std::vector<std::vector<float>> &p, Tiles &values) {
    std::vector<float> flat, acc(p.size() * size(values.dim));
    for (const auto &row : p)
      flat.insert(flat.end(), row.begin(), row.end());
    const Rows rows = values.as_rows();
    of.pv(flat.data(), p[0].size(), static_cast<int>(p.size()), &rows, values.num, values.dim,
          acc.data(), size(values.dim));
    return acc;
  };
  check(isa + " " + format_name(format) + " weighted values, of rows alone and together", [&] {
    Random random(5);
    for (int blocks : {1, 2, 5})
      for (int num_rows = 1; num_rows <= 6; ++num_rows)
        for (int kind = 0; kind < 4; ++kind) {
          const int dim = blocks * unit(format);
          Tiles values(random, format, false, kind == 3 ? 16 : between(random, 1, 19), dim);
          const int n = values.num * kTokens;
          std::vector<std::vector<float>> p(size(num_rows), std::vector<float>(size(n)));
          for (auto &row : p) {
            for (float &x : row)
              x = kind == 0   ? std::exp(-2 * std::fabs(normal(random)))
                  : kind == 1 ? 1.03e-5f // equal, beside a heavy one
                  : kind == 2 ? (random() % 3 ? 0.0f : std::exp(-6 * std::fabs(normal(random))))
                              : 1.0f;
            if (kind == 1)
              row[size(between(random, 0, n - 1))] = 1.0f;
          }
          const std::vector<float> acc = run(p, values);
          for (int r = 0; r < num_rows; ++r) {
            const std::vector<float> alone = run({p[size(r)]}, values);
            EXPECT(std::memcmp(alone.data(), acc.data() + r * dim, size(dim) * 4) == 0,
                   "dim %d rows %d kind %d: row %d has other bits than alone", dim, num_rows, kind,
                   r);
            double error = 0, norm = 0;
            for (int i = 0; i < dim; ++i) {
              double want = 0;
              for (int j = 0; j < n; ++j)
                want += static_cast<double>(p[size(r)][size(j)]) * values.value(j)[i];
              error += std::pow(acc[size(r * dim + i)] - want, 2);
              norm += want * want;
            }
            EXPECT(error <= norm * 1e-3 * 1e-3, "dim %d rows %d kind %d row %d: off by %.3g", dim,
                   num_rows, kind, r, std::sqrt(error / norm));
          }
        }
  });
  check(isa + " " + format_name(format) + " sums of the largest codes don't overflow", [&] {
    Random random(6);
    for (unsigned char byte : {0x00, 0x11, 0x88, 0x7f, 0xf7, 0xff}) {
      const int dim = unit(format);
      Tiles values(random, format, false, 16, dim);
      const std::size_t scales = kTokens * 2;
      for (int t = 0; t < values.num; ++t) {
        std::memset(values.tile(t), byte, values.bytes.size() / 16 - scales);
        for (int j = 0; j < kTokens; ++j) { // 1, or -1
          const f16_t d = byte % 2 ? 0x3c00 : 0xbc00;
          std::memcpy(values.tile(t) + values.bytes.size() / 16 - scales + j * 2, &d, 2);
        }
      }
      values.read();
      const std::vector<float> acc = run({std::vector<float>(256, 1.0f)}, values);
      for (int i = 0; i < dim; ++i) {
        double want = 0;
        for (int j = 0; j < 256; ++j)
          want += values.value(j)[i];
        EXPECT(std::fabs(acc[size(i)] - want) <= 1e-4 * std::fabs(want), "byte %02x dim %d: %g",
               byte, i, static_cast<double>(acc[size(i)]));
      }
    }
  });
  check(isa + " " + format_name(format) + " NaN and infinity reach the rows that see them", [&] {
    Random random(7);
    for (f16_t bad : {0x7e00, 0x7c00, 0xfc00}) {
      const int dim = 2 * unit(format);
      Tiles values(random, format, false, 2, dim);
      unsigned char *scale =
          values.tile(1) + tile_bytes(format, size(dim)) - 2 * kTokens * 2 + 2 * 5;
      std::memcpy(scale, &bad, 2); // token 21, block 0
      std::vector<std::vector<float>> p(3, std::vector<float>(32, 0.5f));
      p[1][21] = 0.0f;
      const std::vector<float> acc = run(p, values);
      for (int r = 0; r < 3; ++r)
        for (int i = 0; i < dim; ++i)
          EXPECT(r == 1 || i >= dim / 2 ? std::isfinite(acc[size(r * dim + i)]) != 0
                 : bad == 0x7e00        ? std::isnan(acc[size(r * dim + i)]) != 0
                                        : true,
                 "row %d dim %d", r, i);
    }
  });
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  for (int f = 0; f < kNumFormats; ++f) {
    const Format format = static_cast<Format>(f);
    if (tile_layout(format) == nullptr)
      continue;
    test_layout(format);
    for (const IsaInfo &isa : compiled_isas()) {
      if (!isa.available)
        continue;
      const Kernels &kernels = kernels_for(isa.name);
      test_conversion(isa.name, kernels, format);
      test_keys(isa.name, kernels, format);
      test_values(isa.name, kernels, format);
    }
  }
  return summary();
}
