// A plane of rows that is stored as tiles of Q4_0: cells are written, read and copied, one by one
// and many at once.
//
// Usage: test_row_plane [part of a check's name]

#include "tile_cases.h"

using namespace mixedkv;
using namespace testing;

namespace {

void test_row_plane() {
  const Kernels &scalar = kernels_for("scalar");
  /// A row of a type and the values that it holds.
  struct Row {
    std::vector<char> bytes;
    std::vector<float> values;
  };
  const auto make_row = [&](Random &random, Format type, int width) {
    Row row;
    row.bytes.resize(row_bytes(type, size(width)));
    row.values.resize(size(width));
    for (float &x : row.values)
      x = normal(random);
    if (type == Format::f32) {
      std::memcpy(row.bytes.data(), row.values.data(), row.bytes.size());
    } else if (type == Format::f16) {
      f16_t *halves = reinterpret_cast<f16_t *>(row.bytes.data());
      scalar.of(Format::f16).from_f32(row.values.data(), halves, size(width));
      scalar.of(Format::f16).to_f32(halves, row.values.data(), size(width));
    } else {
      block_q4_0 *blocks = reinterpret_cast<block_q4_0 *>(row.bytes.data());
      scalar.of(Format::q4_0).from_f32(row.values.data(), blocks, size(width));
      scalar.of(Format::q4_0).to_f32(blocks, row.values.data(), size(width));
    }
    return row;
  };
  const auto quantized = [&](std::vector<float> values) {
    std::vector<block_q4_0> blocks(values.size() / QK4_0);
    scalar.of(Format::q4_0).from_f32(values.data(), blocks.data(), values.size());
    scalar.of(Format::q4_0).to_f32(blocks.data(), values.data(), values.size());
    return values;
  };
  const Format types[] = {Format::f32, Format::f16, Format::q4_0};
  for (Kind kind : {Kind::keys, Kind::values}) {
    const std::string of_kind = kind == Kind::keys ? " keys" : " values";
    check("row plane of packed" + of_kind + ": cells are written and read alone", [&] {
      Random random(44);
      for (int width : {32, 64, 96, 128, 256, 288, 512, 544}) {
        const int heads = 2, cells = 37;
        const RowPlane plane(kind, Format::q4_0, width, heads, cells);
        EXPECT(plane.bytes() >= row_bytes(Format::q4_0, size(width)) * size(heads * cells) &&
                   plane.bytes() < row_bytes(Format::q4_0, size(width)) * size(heads * 48) + 64,
               "bytes of width %d", width);
        Output<char> base(plane.bytes(), 0);
        std::vector<std::vector<float>> expected(size(heads * cells));
        for (int head = 0; head < heads; ++head)
          for (int cell = 0; cell < cells; ++cell) {
            plane.put_zeros(base.data(), head, cell, Format::f32);
            expected[size(head * cells + cell)].assign(size(width), 0.0f);
          }
        for (int step = 0; step < 60; ++step) {
          const int head = between(random, 0, heads - 1), cell = between(random, 0, cells - 1);
          const Format type = types[step % 3];
          const Row row = make_row(random, type, width);
          std::vector<float> &values = expected[size(head * cells + cell)];
          switch (step % 4) {
          case 0: { // from a plane of rows
            const RowPlane rows(kind, type, width, heads, 3);
            std::vector<char> other(rows.bytes());
            if (rows.layout() == Layout::tiles) {
              rows.put(other.data(), head, 2, Format::q4_0, row.bytes.data());
            } else {
              rows.put(other.data(), head, 2, type, row.bytes.data());
            }
            plane.copy(base.data(), head, cell, rows, other.data(), 2);
            values = quantized(row.values);
            break;
          }
          case 1: {
            const int from = between(random, 0, cells - 1);
            plane.copy(base.data(), head, cell, plane, base.data(), from);
            values = std::vector<float>(expected[size(head * cells + from)]);
            break;
          }
          default:
            plane.put(base.data(), head, cell, type, row.bytes.data());
            // Blocks stay as they are: quantising their values anew may turn a block's sign.
            values = type == Format::q4_0 ? row.values : quantized(row.values);
          }
          if (step % 4 == 0 && type == Format::q4_0)
            values = row.values;
          for (int h = 0; h < heads; ++h)
            for (int c = 0; c < cells; ++c) {
              std::vector<float> got(size(width));
              plane.get(base.data(), h, c, got.data());
              EXPECT(got == expected[size(h * cells + c)], "width %d head %d cell %d step %d",
                     width, h, c, step);
            }
        }
        EXPECT(base.guards_intact(), "guards, width %d", width);
        // Back to rows.
        for (Format type : {Format::f32, Format::f16}) {
          const RowPlane rows(kind, type, width, heads, 2);
          std::vector<char> other(rows.bytes());
          rows.copy(other.data(), 1, 1, plane, base.data(), 20);
          std::vector<float> got(size(width));
          rows.get(other.data(), 1, 1, got.data());
          for (int i = 0; i < width; ++i) {
            const float want = expected[size(cells + 20)][size(i)];
            EXPECT(std::fabs(got[size(i)] - want) <=
                       (type == Format::f32 ? 0.0f : std::fabs(want) / 2048 + 1e-7f),
                   "width %d value %d", width, i);
          }
        }
      }
    });
  }
}

void test_rows_at_once() {
  for (Kind kind : {Kind::keys, Kind::values})
    check(std::string("row plane of packed ") + (kind == Kind::keys ? "keys" : "values") +
              ": rows at once are rows one by one",
          [&] {
            Random random(45);
            constexpr int kCells = 53, kHeads = 2;
            for (int step = 0; step < 60; ++step) {
              const int width = step % 2 ? 64 : 160;
              const Format type = step % 3 ? Format::f16 : Format::f32;
              const RowPlane rows(kind, type, width, kHeads, kCells);
              const RowPlane plane(kind, Format::q4_0, width, kHeads, kCells);
              std::vector<char> source(rows.bytes());
              for (int head = 0; head < kHeads; ++head)
                for (int cell = 0; cell < kCells; ++cell) {
                  std::vector<float> values(size(width));
                  for (float &x : values)
                    x = normal(random);
                  rows.put(source.data(), head, cell, Format::f32, values.data());
                }
              std::vector<char> expected(plane.bytes());
              for (char &byte : expected)
                byte = static_cast<char>(random());
              std::vector<char> got = expected;
              std::vector<std::int32_t> from(kCells), to(kCells);
              std::iota(from.begin(), from.end(), 0);
              std::iota(to.begin(), to.end(), 0);
              std::shuffle(from.begin(), from.end(), random);
              if (step % 4 == 0)
                std::shuffle(to.begin(), to.end(), random);
              const int begin = between(random, 0, kCells), n = between(random, 0, kCells - begin);
              if (n > 1 && step % 5 == 0)
                to[size(begin + 1)] = to[size(begin)]; // the last one stays
              const int head = step % kHeads;
              for (int i = begin; i < begin + n; ++i)
                plane.copy(expected.data(), head, to[size(i)], rows, source.data(), from[size(i)]);
              plane.copy_rows(got.data(), head, to.data() + begin, n, rows, source.data(),
                              from.data() + begin);
              EXPECT(got == expected, "step %d, %d rows", step, n);
            }
          });
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  test_row_plane();
  test_rows_at_once();
  return summary();
}
