// attend(), bit by bit, with every instruction set that this machine can run: pages give what keys
// side by side give, what is not seen has no say, NaN reaches who sees it alone, and arithmetic in
// bf16 stays where it is asked for and to be had.
//
// Usage: test_attention_bits [part of a check's name [part of a variant's, as avx2 or "in bf16"]]

#include "attention_calls.h"

using namespace mixedkv;
using namespace testing;

namespace {

void test_bits(const Types &types) {
  const std::string name = std::string("attend, ") + types.name;
  check(name + ": pages give the bits of keys that lie side by side", [&] {
    Random random(88);
    const bool packed = types.k == kPacked || types.v == kPacked;
    // Every size of pages with few query rows and with many, and half of all pairs.
    const struct {
      std::int64_t page_size;
      int few, many;
    } shapes[] = {{1, 1, 9}, {3, 3, 40}, {16, 1, 9}, {17, 3, 40}, {64, 1, 40}, {272, 3, 9}};
    int turn = 0, num_compared = 0;
    for (const auto &shape : shapes)
      for (const int num_queries : {shape.few, shape.many}) {
        const std::int64_t page_size = shape.page_size;
        if (packed && page_size % kTileTokens != 0)
          continue;
        const std::int64_t len = between(random, 1, 900);
        Source run_of_keys = run_of_cells(random, types.k, types.v, 64, 96, 2, 0, len);
        Source paged = in_pages(random, run_of_keys, page_size);
        Call call = make_call(random, {&run_of_keys}, num_queries, 2);
        const auto expect_same = [&](const char *what) {
          turn = ++num_compared; // so that every variant has either number of threads
          for (const Variant &variant : variants()) {
            call.sources = {&run_of_keys};
            const Result want = run(call, variant, 2);
            call.sources = {&paged};
            const int threads = turn++ % 2 ? 1 : 3;
            EXPECT(run(call, variant, threads) == want,
                   "%s, %s: %d keys in pages of %d, %d queries, %d threads", variant.name().c_str(),
                   what, static_cast<int>(len), static_cast<int>(page_size), num_queries, threads);
          }
        };
        expect_same("all");
        call.causal = true;
        expect_same("causal");
        call.window_left = between(random, 0, static_cast<int>(len));
        expect_same("window");
        for (Source *source : {&run_of_keys, &paged}) {
          for (std::int64_t j = len; j-- > 0;)
            source->pos.push_back(static_cast<std::int32_t>(j));
        }
        expect_same("positions in disorder");
      }
  });
  check(name + ": cells that are not seen have no say in a bit", [&] {
    Random random(86);
    for (int num_queries : {1, 4, 8, 33})
      for (int step = 0; step < 4; ++step) {
        Source source = step % 2 ? run_of_cells(random, types.k, types.v, 64, 64, 1, 13, 150)
                                 : scattered_cells(random, types.k, types.v, 64, 64, 1, 150, 2, 4);
        Call call = make_call(random, {&source}, num_queries);
        // Some keys are hidden from all queries, by a mask or for being later than they are.
        std::vector<bool> hidden(size(source.len), false);
        if (step < 2) {
          call.mask_type = MaskType::boolean;
          for (std::int64_t j = 0; j < source.len; ++j)
            hidden[size(j)] = random() % 3 == 0;
          for (int row = 0; row < num_queries; ++row)
            for (std::int64_t j = 0; j < source.len; ++j)
              call.boolean_mask.push_back(!hidden[size(j)]);
        } else {
          call.causal = true;
          std::vector<std::int32_t> positions;
          for (std::int64_t j = 0; j < source.len; ++j)
            source.pos.push_back(static_cast<std::int32_t>(j));
          std::shuffle(source.pos.begin(), source.pos.end(), random);
          call.q_pos.assign(size(num_queries), 80);
          for (std::int64_t j = 0; j < source.len; ++j)
            hidden[size(j)] = source.pos[size(j)] > 80;
        }
        const std::vector<Result> with_nan_around = check_call(call, "NaN around");
        std::vector<bool> in_use(size(source.k.cells), false);
        for (std::int64_t j = 0; j < source.len; ++j)
          in_use[size(source.cell(j))] = !hidden[size(j)];
        for (int content = 0; content < 4; ++content) {
          for (std::int64_t cell = 0; cell < source.k.cells; ++cell)
            if (!in_use[size(cell)]) {
              if (content == 0) {
                source.k.randomise(random, cell, 10.0f);
                source.v.randomise(random, cell, 100.0f);
              } else {
                const float x = content == 1 ? 0.0f : content == 2 ? 6e4f : kNan;
                source.k.fill(cell, x);
                source.v.fill(cell, x);
              }
            }
          for (std::size_t n = 0; n < variants().size(); ++n)
            EXPECT(run(call, variants()[n], 2) == with_nan_around[n],
                   "%s: %d queries, step %d, content %d", variants()[n].name().c_str(), num_queries,
                   step, content);
        }
      }
  });
  check(name + ": NaN reaches the queries that see it and no other", [&] {
    Random random(87);
    for (int num_queries : {4, 8, 33})
      for (bool in_key : {false, true})
        for (bool scattered : {false, true}) {
          Source source = scattered
                              ? scattered_cells(random, types.k, types.v, 64, 64, 1, 100, 2, 6)
                              : run_of_cells(random, types.k, types.v, 64, 64, 1, 13, 100);
          Call call = make_call(random, {&source}, num_queries);
          call.causal = true;
          const std::vector<Result> finite = check_call(call, "finite");
          const std::int64_t bad = source.len - 2; // seen by the last two queries
          (in_key ? source.k : source.v).fill(source.cell(bad), kNan);
          for (std::size_t n = 0; n < variants().size(); ++n) {
            const std::string on = variants()[n].name();
            const Result result = run(call, variants()[n], 2);
            for (int i = 0; i < num_queries; ++i)
              for (int d = 0; d < 64; ++d) {
                const float x = result.out[size(i * 64 + d)];
                if (i < num_queries - 2)
                  EXPECT(bits_of(x) == bits_of(finite[n].out[size(i * 64 + d)]),
                         "%s: %d queries: bits of query %d", on.c_str(), num_queries, i);
                else
                  EXPECT(std::isnan(x), "%s: %d queries: query %d is %g", on.c_str(), num_queries,
                         i, static_cast<double>(x));
              }
          }
        }
  });
  check(name + ": bf16 leaves decode steps, and who has none, in f32", [&] {
    Random random(91);
    for (int num_queries : {1, 9, 40}) {
      const Source source = run_of_cells(random, types.k, types.v, 64, 96, 2, 5, 300);
      Call call = make_call(random, {&source}, num_queries, 12);
      call.causal = true;
      for (const Variant &variant : variants()) {
        if (variant.compute_type == ComputeType::bf16)
          continue;
        const bool has_bf16 = kernels_for(variant.isa).bf16 != nullptr;
        const Result want = run(call, variant, 2);
        EXPECT((run(call, {variant.isa, ComputeType::bf16}, 2) == want) ==
                   (!has_bf16 || num_queries == 1),
               "%s, %d queries", variant.name().c_str(), num_queries);
      }
    }
  });
}

} // namespace

int main(int argc, char **argv) { return run_checks(argc, argv, test_bits); }
