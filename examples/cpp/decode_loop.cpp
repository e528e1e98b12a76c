// mixedkv from C++: a cache that keeps new tokens in f16 and moves older ones to Q4_0, driven as a
// model drives it, a token at a time.
//
// Usage: decode_loop                some numbers of its own; prints a part of the result
//        decode_loop INPUT OUTPUT   numbers from a file, all of the result into another: INPUT is a
//                                   struct Sizes, then q, k, v for each token and layer in turn;
//                                   OUTPUT is out for each token and layer (float)
#include <mixedkv/cache.h>
#include <mixedkv/runtime.h>
#include <mixedkv/version.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <random>
#include <stdexcept>
#include <vector>

namespace {

struct Sizes {
  std::int32_t num_layers = 2;
  std::int32_t num_qo_heads = 8;
  std::int32_t num_kv_heads = 2;
  std::int32_t head_dim = 64;
  std::int32_t num_tokens = 500;
  std::int32_t hot_size = 128;
  std::int32_t cold_size = 1024;
  std::int32_t group_size = 64;
};

/// Numbers of a file, or normal ones where there is none.
class Numbers {
public:
  explicit Numbers(const char *path) : has_file_(path != nullptr) {
    if (has_file_)
      file_.open(path, std::ios::binary);
  }
  template <typename T> void read(T *values, std::size_t n) {
    if (!file_.read(reinterpret_cast<char *>(values), static_cast<std::streamsize>(n * sizeof(T))))
      throw std::runtime_error("the input ends too early, or can't be read");
  }
  void fill(std::vector<float> &values) {
    if (has_file_)
      read(values.data(), values.size());
    else
      for (float &x : values)
        x = normal_(random_);
  }

private:
  bool has_file_;
  std::ifstream file_;
  std::mt19937 random_{42};
  std::normal_distribution<float> normal_;
};

/// num_heads rows, one token's, side by side.
mixedkv::RowsView rows_of(const std::vector<float> &values, std::int32_t head_dim) {
  const auto row = static_cast<std::ptrdiff_t>(sizeof(float)) * head_dim;
  return {values.data(), mixedkv::Format::f32, row, row};
}

void run(const char *input, const char *output) {
  Numbers numbers(input);
  Sizes sizes;
  if (input != nullptr)
    numbers.read(&sizes, 1);

  mixedkv::CacheConfig config;
  config.num_layers = sizes.num_layers;
  config.num_kv_heads = sizes.num_kv_heads;
  config.head_dim = config.head_dim_v = sizes.head_dim;
  config.hot_size = sizes.hot_size;
  config.cold_size = sizes.cold_size;
  config.group_size = sizes.group_size;
  mixedkv::MixedCache cache(config);

  mixedkv::AttendOptions options;
  options.sm_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(sizes.head_dim)));
  const auto width = static_cast<std::size_t>(sizes.head_dim);
  std::vector<float> q(static_cast<std::size_t>(sizes.num_qo_heads) * width);
  std::vector<float> k(static_cast<std::size_t>(sizes.num_kv_heads) * width), v(k.size());
  std::vector<float> out(q.size()), results;
  const std::int64_t owner_begin[] = {0, 1}, owner[] = {0}; // sequence 0 owns every token
  for (std::int64_t pos = 0; pos < sizes.num_tokens; ++pos) {
    if (!cache.find_slot(&pos, {owner_begin, owner}, 1))
      throw std::runtime_error("the cache is full");
    for (int layer = 0; layer < sizes.num_layers; ++layer) {
      numbers.fill(q);
      numbers.fill(k);
      numbers.fill(v);
      cache.store(layer, rows_of(k, sizes.head_dim), rows_of(v, sizes.head_dim));
      mixedkv::QueryView queries;
      queries.data = q.data();
      queries.head_stride = queries.row_stride = rows_of(q, sizes.head_dim).row_stride;
      queries.len = 1;
      mixedkv::OutputView to;
      to.data = out.data();
      to.head_stride = to.row_stride = sizes.head_dim;
      cache.attend(layer, queries, sizes.num_qo_heads, options, to);
      results.insert(results.end(), out.begin(), out.end());
    }
    cache.commit(); // above the threshold, the oldest move to cold
  }

  const mixedkv::CacheStats stats = cache.stats();
  std::printf("mixedkv %s on %s: %lld tokens hot, %lld cold, %lld bytes saved\n",
              MIXEDKV_VERSION_STRING, mixedkv::active_isa(),
              static_cast<long long>(stats.hot_tokens), static_cast<long long>(stats.cold_tokens),
              static_cast<long long>(stats.bytes_saved));
  std::printf("last out: %9.6f %9.6f %9.6f ...\n", static_cast<double>(out[0]),
              static_cast<double>(out[1]), static_cast<double>(out[2]));
  if (output != nullptr) {
    std::ofstream file(output, std::ios::binary);
    file.write(reinterpret_cast<const char *>(results.data()),
               static_cast<std::streamsize>(results.size() * sizeof(float)));
    if (!file.flush())
      throw std::runtime_error("the output can't be written");
  }
}

} // namespace

int main(int argc, char **argv) {
  try {
    run(argc == 3 ? argv[1] : nullptr, argc == 3 ? argv[2] : nullptr);
  } catch (const std::exception &error) {
    std::fprintf(stderr, "decode_loop: %s\n", error.what());
    return 1;
  }
  return 0;
}
