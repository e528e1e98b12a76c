// Runs of keys: where they are cut, and that every key and value of theirs is found where the
// segment says that it lies. Nothing is read: addresses are compared.
//
// Usage: test_key_run [part of a check's name]

#include "attention/check_keys.h"
#include "attention/key_run.h"
#include "checks.h"

#include <stdexcept>

using namespace mixedkv;
using namespace testing;

namespace {

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

/// Memory that is never touched.
const char *const kKeys = reinterpret_cast<const char *>(std::uintptr_t{1} << 40);
const char *const kValues = reinterpret_cast<const char *>(std::uintptr_t{1} << 41);

/// A segment whose heads, rows and tiles all lie at different distances.
KeySegment segment_of(Layout k_layout, Layout v_layout, std::int64_t len) {
  KeySegment s;
  s.k = kKeys;
  s.v = kValues;
  s.k_format = s.v_format = Format::q4_0;
  s.k_layout = k_layout;
  s.v_layout = v_layout;
  s.k_head_stride = 1 << 30;
  s.v_head_stride = 3 << 20;
  s.k_row_stride = 72;
  s.v_row_stride = 576;
  s.len = len;
  return s;
}

/// Where key j lies by the segment's definition: its row, or its tile and the token in it.
struct Place {
  const char *address;
  int token;
};

Place place(const KeySegment &s, const void *data, Layout layout, std::ptrdiff_t head_stride,
            std::ptrdiff_t row_stride, std::ptrdiff_t page_stride, int head, std::int64_t j) {
  const char *base = static_cast<const char *>(data) + head * head_stride;
  if (s.pages != nullptr) {
    base += s.pages[j / s.page_size] * page_stride;
    j %= s.page_size;
    return layout == Layout::tiles
               ? Place{base + j / kTileTokens * row_stride, static_cast<int>(j % kTileTokens)}
               : Place{base + j * row_stride, 0};
  }
  if (layout == Layout::tiles) {
    const std::int64_t cell = s.index != nullptr ? s.index[j] : s.first_cell + j;
    return {base + cell / kTileTokens * row_stride, static_cast<int>(cell % kTileTokens)};
  }
  return {base + (s.index != nullptr ? s.index[j] : j) * row_stride, 0};
}

/// Walks over keys [begin, end) and compares all that the runs say.
void expect_walk(const KeySegment &s, std::int64_t begin, std::int64_t end, int most,
                 const char *what) {
  constexpr int head = 2;
  KeyRun run(head, most);
  const bool packed = s.k_layout == Layout::tiles || s.v_layout == Layout::tiles;
  std::int64_t next = begin;
  while (next < end) {
    run.take(s, next, end);
    EXPECT(&run.segment() == &s && run.begin() == next, "%s: begins elsewhere", what);
    EXPECT(run.size() >= 1 && run.size() <= most && next + run.size() <= end, "%s: size %d", what,
           run.size());
    if (run.size() < 1)
      return;
    const bool may_be_cut = packed && s.index != nullptr;
    EXPECT(may_be_cut || run.size() == std::min<std::int64_t>(most, end - next),
           "%s: %d keys of %d", what, run.size(), static_cast<int>(end - next));
    EXPECT(packed == (run.num_tiles() > 0), "%s: tiles", what);
    EXPECT(run.num_tokens() <= most + kScoresPad, "%s: scores of %d tokens", what,
           run.num_tokens());
    for (int j = 0; j < run.size(); ++j) {
      const int token = run.scattered() ? run.slot(j) : run.lead() + j;
      for (const bool key : {true, false}) {
        const Layout layout = key ? s.k_layout : s.v_layout;
        const Place want = key ? place(s, s.k, s.k_layout, s.k_head_stride, s.k_row_stride,
                                       s.k_page_stride, head, next + j)
                               : place(s, s.v, s.v_layout, s.v_head_stride, s.v_row_stride,
                                       s.v_page_stride, head, next + j);
        const Rows &rows = key ? run.keys() : run.values();
        const bool tile = layout == Layout::tiles;
        EXPECT(row_at(rows, tile ? token / kTileTokens : j) == want.address &&
                   (!tile || token % kTileTokens == want.token),
               "%s: %s %d", what, key ? "key" : "value", static_cast<int>(next + j));
        if (tile)
          EXPECT(token < run.num_tokens(), "%s: token %d of %d", what, token, run.num_tokens());
      }
    }
    next += run.size();
  }
  EXPECT(next == end, "%s: ends at %d", what, static_cast<int>(next));
}

/// Ascending cells; one in `sparseness`, in stretches.
std::vector<std::int32_t> ascending(Random &random, std::int64_t n, int sparseness, int stretch) {
  std::vector<std::int32_t> cells;
  std::int32_t next = between(random, 0, 40);
  while (size(n) > cells.size()) {
    const int count = between(random, 1, stretch);
    for (int i = 0; i < count && size(n) > cells.size(); ++i)
      cells.push_back(next++);
    next += between(random, 0, 2 * (sparseness - 1) * count);
  }
  return cells;
}

constexpr Layout kLayouts[] = {Layout::rows, Layout::tiles};

template <typename F> void for_all_layouts(F &&body) {
  for (const Layout k : kLayouts)
    for (const Layout v : kLayouts)
      for (const int most : {kChunkKeys, kChunkKeysFullTile})
        body(k, v, most);
}

void test_unbroken() {
  check("keys one after the other", [] {
    for_all_layouts([](Layout k, Layout v, int most) {
      for (const std::int64_t len : {1, 15, 16, 17, 128, 129, 255, 256, 257, 1000})
        for (const std::int64_t first : {0, 1, 15, 16, 37}) {
          KeySegment s = segment_of(k, v, len);
          s.first_cell = k == Layout::rows && v == Layout::rows ? 0 : first;
          expect_walk(s, 0, len, most, "all");
          expect_walk(s, len / 3, len - len / 4, most, "a part");
        }
    });
  });
}

void test_index() {
  check("keys by an ascending index", [] {
    Random random(11);
    for_all_layouts([&](Layout k, Layout v, int most) {
      for (const std::int64_t len : {1, 16, 17, 130, 256, 700})
        for (const int sparseness : {1, 2, 5, 40}) {
          const std::vector<std::int32_t> index = ascending(random, len, sparseness, 30);
          KeySegment s = segment_of(k, v, len);
          s.index = index.data();
          expect_walk(s, 0, len, most, "all");
          expect_walk(s, len / 3, len - len / 4, most, "a part");
        }
    });
  });
  check("an unbroken stretch of an index is rows one after the other", [] {
    const std::vector<std::int32_t> index{3, 7, 8, 9, 10, 20};
    KeySegment s = segment_of(Layout::rows, Layout::rows, 6);
    s.index = index.data();
    KeyRun run(0, kChunkKeys);
    run.take(s, 1, 5);
    EXPECT(run.keys().index == nullptr, "7 to 10");
    run.take(s, 0, 5);
    EXPECT(run.keys().index != nullptr, "3 to 10");
  });
  check("tiles that come next are listed for kernels to ask for", [] {
    std::vector<std::int32_t> index;
    for (int i = 0; i < 600; ++i)
      index.push_back(2 * i);
    KeySegment s = segment_of(Layout::tiles, Layout::tiles, 600);
    s.index = index.data();
    KeyRun run(0, kChunkKeys);
    run.take(s, 0, 600);
    const Rows &tiles = run.keys();
    EXPECT(tiles.num_ahead > 0 && tiles.num_ahead <= kChunkKeys / kTileTokens, "%d",
           tiles.num_ahead);
    for (int i = 0; i < run.num_tiles() + tiles.num_ahead; ++i)
      EXPECT(tiles.index[i] == i, "tile %d", i);
    run.take(s, 599, 600);
    EXPECT(run.keys().num_ahead == 0, "nothing follows");
  });
}

/// Page numbers in any order, some of them more than once, some one after the other.
std::vector<std::int32_t> page_table(Random &random, std::int64_t n) {
  std::vector<std::int32_t> pages;
  while (size(n) > pages.size())
    pages.push_back(!pages.empty() && between(random, 0, 2) == 0 ? pages.back() + 1
                                                                 : between(random, 0, 500));
  return pages;
}

void test_pages() {
  check("keys in pages", [] {
    Random random(12);
    for_all_layouts([&](Layout k, Layout v, int most) {
      const bool packed = k == Layout::tiles || v == Layout::tiles;
      for (const std::int64_t page_size : {1, 3, 16, 17, 64, 160, 4096})
        for (const std::int64_t len : {1, 15, 64, 130, 256, 257, 700})
          // Pages side by side; with gaps; of strides that share little; backwards; all the same.
          for (const int step : {0, 1, 2, 3, 4}) {
            if (packed && page_size % kTileTokens != 0)
              continue;
            const std::vector<std::int32_t> pages =
                page_table(random, (len + page_size - 1) / page_size);
            KeySegment s = segment_of(k, v, len);
            s.pages = pages.data();
            s.page_size = page_size;
            const auto stride = [&](Layout layout, std::ptrdiff_t row) -> std::ptrdiff_t {
              const std::ptrdiff_t page =
                  row * (layout == Layout::tiles ? page_size / kTileTokens : page_size);
              return step == 0   ? page
                     : step == 1 ? page + 3 * row
                     : step == 2 ? page + 10
                     : step == 3 ? -page
                                 : 0;
            };
            s.k_page_stride = stride(k, s.k_row_stride);
            s.v_page_stride = stride(v, s.v_row_stride);
            expect_walk(s, 0, len, most, "all");
            expect_walk(s, len / 3, len - len / 4, most, "a part");
          }
    });
  });
  check("pages one after the other in memory are rows one after the other", [] {
    const std::vector<std::int32_t> pages{4, 5, 6, 2};
    KeySegment s = segment_of(Layout::rows, Layout::rows, 40);
    s.pages = pages.data();
    s.page_size = 10;
    s.k_page_stride = 10 * s.k_row_stride;
    s.v_page_stride = 11 * s.v_row_stride;
    KeyRun run(0, kChunkKeys);
    run.take(s, 5, 30);
    EXPECT(run.keys().index == nullptr && run.values().index != nullptr, "pages 4 to 6");
    run.take(s, 12, 18);
    EXPECT(run.keys().index == nullptr && run.values().index == nullptr, "page 5");
    run.take(s, 25, 35);
    EXPECT(run.keys().index != nullptr && run.values().index != nullptr, "pages 6 and 2");
  });
  check("tiles of pages that come next are listed for kernels to ask for", [] {
    const std::vector<std::int32_t> pages{9, 3, 5, 0, 7};
    KeySegment s = segment_of(Layout::tiles, Layout::tiles, 5 * 128);
    s.pages = pages.data();
    s.page_size = 128;
    s.k_page_stride = s.v_page_stride = 1 << 20;
    KeyRun run(0, kChunkKeys);
    run.take(s, 0, 300);
    EXPECT(run.num_tiles() == 16 && run.keys().num_ahead == 3, "%d", run.keys().num_ahead);
    for (int t = 0; t < 19; ++t)
      EXPECT(row_at(run.keys(), t) ==
                 kKeys + pages[size(t / 8)] * s.k_page_stride + t % 8 * s.k_row_stride,
             "tile %d", t);
  });
}

void expect_refused(const KeySegment &s, const char *part, const char *what) {
  try {
    check_keys(s);
    EXPECT(false, "%s is taken", what);
  } catch (const std::invalid_argument &error) {
    EXPECT(std::strstr(error.what(), part) != nullptr, "%s: %s", what, error.what());
  }
}

void test_checks() {
  check("lists that can't be walked are refused, with name and value", [] {
    KeySegment s = segment_of(Layout::rows, Layout::rows, 3);
    std::vector<std::int32_t> list{4, 7, 6};
    s.index = list.data();
    expect_refused(s, "index[1] = 7 and index[2] = 6", "a step back");
    list = {4, 4, 6};
    expect_refused(s, "index[0] = 4 and index[1] = 4", "a key twice");
    list = {-1, 4, 6};
    expect_refused(s, "index[0] = -1", "a negative row");
    list = {4, 5, 9};
    check_keys(s);
    s.len = 0;
    list = {4, 3, 2};
    check_keys(s); // nothing of it is looked at
    s.len = -1;
    expect_refused(s, "-1", "a negative length");

    s.len = 3;
    s.pages = list.data();
    expect_refused(s, "both", "an index and pages");
    s.index = nullptr;
    expect_refused(s, "page_size must be 1 or more, got 0", "no page size");
    s.page_size = 1;
    s.k_page_stride = s.v_page_stride = 576;
    check_keys(s);
    list = {4, -3, 2};
    expect_refused(s, "pages[1] = -3", "a negative page");
    s.page_size = 3; // the first page alone holds all keys
    check_keys(s);
    list = {1 << 30};
    s.page_size = 4;
    s.k_page_stride = 4 * s.k_row_stride;
    expect_refused(s, "too far apart", "4 * 2^30 rows");
    list = {4};
    s.k_layout = Layout::tiles;
    expect_refused(s, "page_size must be a multiple of 16, got 4", "a part of a tile");
    s.page_size = 32;
    check_keys(s);
  });
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1)
    name_filter = argv[1];
  test_unbroken();
  test_index();
  test_pages();
  test_checks();
  return summary();
}
