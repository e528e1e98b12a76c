// attend() on key segments made by hand, against a double loop in float64, with every instruction
// set that this machine can run: packed keys and values that start and end within a tile or lie
// scattered over many, rows beside packed ones, few and many query rows, windows, positions, masks.
// Cells that nobody may see hold NaN throughout, so that whatever leaks shows.
//
// Usage: test_attention [part of a check's name [part of a variant's, as avx2 or "in bf16"]]

#include "attention_calls.h"

using namespace mixedkv;
using namespace testing;

namespace {

void test_attend(const Types &types) {
  const std::string name = std::string("attend, ") + types.name;
  check(name + ": runs that start and end within tiles", [&] {
    Random random(81);
    for (std::int64_t first : {0, 1, 7, 15, 16, 35})
      for (std::int64_t len : {1, 2, 15, 16, 17, 40, 129, 261}) {
        const int dim = between(random, 0, 1) ? 64 : 96;
        const Source source = run_of_cells(random, types.k, types.v, dim, 160 - dim, 1, first, len);
        const int num_queries = kQueries[between(random, 0, 5)];
        Call call = make_call(random, {&source}, num_queries, between(random, 1, 2));
        check_call(call, "all");
        call.causal = true;
        check_call(call, "causal");
      }
  });
  check(name + ": scattered cells", [&] {
    Random random(82);
    const struct {
      std::int64_t len;
      int sparseness, stretch;
    } shapes[] = {{1, 1, 1},  {5, 30, 1},   {17, 40, 1},  {18, 40, 1},  {30, 50, 1},
                  {60, 4, 3}, {270, 2, 40}, {300, 3, 10}, {257, 1, 64}, {40, 20, 2}};
    for (const auto &shape : shapes)
      for (int num_queries : {1, 4, 9, 33}) {
        Source source = scattered_cells(random, types.k, types.v, 32, 64, 1, shape.len,
                                        shape.sparseness, shape.stretch);
        Call call = make_call(random, {&source}, num_queries);
        check_call(call, "all");
        // Positions that have nothing to do with the order of cells.
        for (std::int64_t j = 0; j < source.len; ++j)
          source.pos.push_back(static_cast<std::int32_t>(j));
        std::shuffle(source.pos.begin(), source.pos.end(), random);
        call.causal = true;
        check_call(call, "causal");
        call.window_left = between(random, 0, static_cast<int>(shape.len));
        check_call(call, "window");
      }
  });
  check(name + ": query rows, heads and dims", [&] {
    Random random(83);
    for (int num_queries : kQueries)
      for (int dim : {32, 128, 256}) {
        const Source source =
            run_of_cells(random, types.k, types.v, dim, 32 * between(random, 1, 5), 2,
                         between(random, 0, 31), 50);
        check_call(make_call(random, {&source}, num_queries, num_queries % 3 + 1), "all");
      }
    const Source wide = run_of_cells(random, types.k, types.v, 512, 512, 1, 3, 300);
    for (int num_queries : {1, 8, 9, 32})
      check_call(make_call(random, {&wide}, num_queries), "512 dims");
  });
  check(name + ": windows, soft cap, slopes and masks", [&] {
    Random random(84);
    for (int num_queries : {1, 3, 8, 33}) {
      const Source run = run_of_cells(random, types.k, types.v, 64, 32, 1, 5, 290);
      const Source scattered = scattered_cells(random, types.k, types.v, 64, 32, 1, 150, 3, 5);
      for (const Source *source : {&run, &scattered}) {
        Call call = make_call(random, {source}, num_queries, 2);
        for (std::int64_t window : {0, 1, 15, 40, 200}) {
          Call windowed = call;
          windowed.window_left = window;
          windowed.causal = window % 2 == 0;
          check_call(windowed, "window");
          windowed.window_right = window / 2;
          check_call(windowed, "window on both sides");
          windowed.window_left = -1;
          windowed.causal = false;
          check_call(windowed, "window on the right");
        }
        Call capped = call;
        capped.soft_cap = 1.5f;
        capped.causal = true;
        capped.alibi_slopes = {0.25f, 0.01f};
        check_call(capped, "soft cap and slopes");
        const std::size_t entries = size(2 * num_queries * source->len);
        Call masked = call;
        masked.mask_type = MaskType::boolean;
        for (std::size_t i = 0; i < entries; ++i)
          masked.boolean_mask.push_back(random() % 3 != 0);
        std::fill_n(masked.boolean_mask.begin(), source->len, 0); // the first row sees nothing
        check_call(masked, "boolean mask");
        masked.causal = true;
        check_call(masked, "boolean mask and causal");
        masked.alibi_slopes = {0.25f, 0.01f};
        check_call(masked, "boolean mask and slopes");
        Call biased = call;
        biased.mask_type = MaskType::f32;
        for (std::size_t i = 0; i < entries; ++i)
          biased.float_mask.push_back(random() % 3 == 0 ? -kInf : normal(random));
        check_call(biased, "f32 mask");
      }
    }
  });
  check(name + ": several segments", [&] {
    Random random(85);
    for (int num_queries : {1, 4, 33, 70}) {
      Source cold = scattered_cells(random, types.k, types.v, 64, 64, 2, 310, 2, 9);
      Source hot = run_of_cells(random, Format::f16, Format::f16, 64, 64, 2, 0, 70);
      Source other = run_of_cells(random, types.v == Format::f16 ? kPacked : types.v, types.k, 64,
                                  64, 2, 29, 41);
      Source empty(types.k, types.v, 64, 64, 2, 16);
      std::int32_t next = 0;
      for (Source *source : {&other, &cold, &hot}) {
        source->pos.clear();
        for (std::int64_t j = 0; j < source->len; ++j)
          source->pos.push_back(next++);
      }
      Call call = make_call(random, {&cold, &empty, &hot, &other}, num_queries);
      check_call(call, "all");
      call.causal = true;
      check_call(call, "causal");
      call.window_left = 90;
      for (int i = 0; i < num_queries; ++i)
        call.q_pos.push_back(between(random, 0, static_cast<int>(call.num_keys())));
      check_call(call, "window, queries anywhere");
    }
  });
}

} // namespace

int main(int argc, char **argv) {
  const int status = run_checks(argc, argv, test_attend);
  std::printf("largest relative error where Q4_0 takes part: %.2g\n", worst_error);
  return status;
}
