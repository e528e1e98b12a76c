#include "bandwidth.h"

#include "data.h"
#include "kernels/cpu_features.h"
#include "registry.h"
#include "runtime/parallel.h"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <utility>

#if defined(__GNUC__)
#define MIXEDKV_ALWAYS_INLINE inline __attribute__((always_inline))
#define MIXEDKV_PREFETCH(p) __builtin_prefetch(p)
#else
#define MIXEDKV_ALWAYS_INLINE inline
#define MIXEDKV_PREFETCH(p) ((void)(p))
#endif

namespace mixedkv::bench {
namespace {

constexpr std::size_t kPage = 4096;
/// As many pieces as attention makes of a call.
constexpr std::size_t kPieces = 64;

/// 64 bytes that are added at once: one register, or as many as it takes.
#if defined(__GNUC__)
typedef std::uint64_t Line __attribute__((vector_size(64)));
#else
struct Line {
  std::uint64_t word[8];
  Line &operator+=(const Line &other) {
    for (int i = 0; i < 8; ++i)
      word[i] += other.word[i];
    return *this;
  }
};
#endif

/// Reads kStreams parts side by side, each asked for kAhead bytes ahead (0: the hardware alone
/// guesses). bytes: a multiple of kPage.
template <int kStreams, int kAhead>
MIXEDKV_ALWAYS_INLINE std::uint64_t read_streams(const char *data, std::size_t bytes) {
  constexpr int kUnroll = 8;
  const std::size_t part = bytes / kStreams;
  Line sums[kUnroll] = {};
  for (std::size_t i = 0; i < part; i += kUnroll * sizeof(Line)) {
    for (int s = 0; s < kStreams; ++s) {
      const char *p = data + part * static_cast<std::size_t>(s) + i;
      for (std::size_t u = 0; u < kUnroll; ++u) {
        if (kAhead > 0) {
          MIXEDKV_PREFETCH(p + kAhead + u * sizeof(Line));
        }
        Line line;
        std::memcpy(&line, p + u * sizeof(Line), sizeof line);
        sums[u] += line;
      }
    }
  }
  for (int u = 1; u < kUnroll; ++u) {
    sums[0] += sums[u];
  }
  std::uint64_t words[sizeof(Line) / 8];
  std::memcpy(words, &sums[0], sizeof words);
  std::uint64_t total = 0;
  for (const std::uint64_t word : words) {
    total += word;
  }
  return total;
}

using Read = std::uint64_t(const char *data, std::size_t bytes);

constexpr int kNumWays = 3;
struct Ways {
  Read *read[kNumWays];
};
const char *const kWayNames[kNumWays] = {"1_stream", "1_stream_prefetched", "4_streams"};

// The same loops, for registers of several widths: the compiler cuts a Line as it must.
#define MIXEDKV_WAYS(name, attributes)                                                             \
  attributes std::uint64_t name##_1(const char *data, std::size_t bytes) {                         \
    return read_streams<1, 0>(data, bytes);                                                        \
  }                                                                                                \
  attributes std::uint64_t name##_1_ahead(const char *data, std::size_t bytes) {                   \
    return read_streams<1, 1024>(data, bytes);                                                     \
  }                                                                                                \
  attributes std::uint64_t name##_4(const char *data, std::size_t bytes) {                         \
    return read_streams<4, 0>(data, bytes);                                                        \
  }                                                                                                \
  const Ways name = {{name##_1, name##_1_ahead, name##_4}};

MIXEDKV_WAYS(plain, )
#if defined(__GNUC__) && defined(__x86_64__)
MIXEDKV_WAYS(avx2, __attribute__((target("avx2"))))
MIXEDKV_WAYS(avx512, __attribute__((target("avx512f"))))
#endif

const Ways &ways() {
#if defined(__GNUC__) && defined(__x86_64__)
  if (cpu_features().avx512f) {
    return avx512;
  }
  if (cpu_features().avx2) {
    return avx2;
  }
#endif
  return plain;
}

std::size_t round_up(std::size_t n, std::size_t step) { return (n + step - 1) / step * step; }

/// The first `bytes` bytes of the one buffer that all read.
const char *buffer(std::size_t bytes) {
  static std::unique_ptr<Memory> memory;
  if (memory == nullptr || memory->size() < bytes) {
    memory.reset();
    memory = std::make_unique<Memory>(bytes);
  }
  return memory->as<char>();
}

/// Sums the buffer. Workers draw pieces as they do in attention. bytes: a multiple of kPage.
std::uint64_t read(int way, std::size_t bytes, int threads) {
  Read *const read_piece = ways().read[way];
  const char *const data = buffer(bytes);
  const std::size_t piece = round_up((bytes + kPieces - 1) / kPieces, kPage);
  std::array<std::uint64_t, kPieces> sums{};
  parallel_for(static_cast<std::int64_t>((bytes + piece - 1) / piece), threads,
               [&](std::int64_t unit) {
                 const std::size_t begin = static_cast<std::size_t>(unit) * piece;
                 sums[static_cast<std::size_t>(unit)] =
                     read_piece(data + begin, std::min(piece, bytes - begin));
               });
  benchmark::DoNotOptimize(sums);
  return std::accumulate(sums.begin(), sums.end(), std::uint64_t{0});
}

int find_fastest_way(std::size_t bytes, int threads) {
  std::array<double, kNumWays> best{};
  read(0, bytes, threads);
  for (int round = 0; round < 6; ++round) {
    for (int way = 0; way < kNumWays; ++way) {
      const double begin = now();
      read(way, bytes, threads);
      double &of_way = best[static_cast<std::size_t>(way)];
      of_way = round == 0 ? now() - begin : std::min(of_way, now() - begin);
    }
  }
  return static_cast<int>(std::min_element(best.begin(), best.end()) - best.begin());
}

class ReadLoop : public Subject {
public:
  ReadLoop(int way, std::size_t bytes) : way_(way), bytes_(bytes) {}
  void run(const Context &context) override { sum_ = read(way_, bytes_, context.threads); }
  float result() const override { return static_cast<float>(sum_); }

private:
  int way_;
  std::size_t bytes_;
  std::uint64_t sum_ = 0;
};

} // namespace

double read_speed(std::size_t bytes, int threads) {
  constexpr double kSeconds = 0.01;
  static std::map<std::pair<std::size_t, int>, int> fastest;
  bytes = round_up(bytes, kPage);
  const auto key = std::make_pair(bytes, threads);
  if (fastest.find(key) == fastest.end()) {
    fastest[key] = find_fastest_way(bytes, threads);
  }
  const int way = fastest[key];
  read(way, bytes, threads);
  int passes = 0;
  double seconds = 0;
  for (const double begin = now(); seconds < kSeconds; seconds = now() - begin) {
    read(way, bytes, threads);
    ++passes;
  }
  return static_cast<double>(bytes) * passes / seconds;
}

void add_read_benchmarks(const Options &options) {
  for (const Shape &shape : chosen(options.shapes, {{32, 8, 128}})) {
    for (const std::int64_t kv : chosen(options.kv, {512, 4096, 32768})) {
      const std::size_t bytes = round_up(kv_bytes(shape, kv, Format::f16), kPage);
      for (int way = 0; way < kNumWays; ++way) {
        add_foreign_benchmarks(options,
                               std::string("read/") + kWayNames[way] + "/" + name_of(shape) +
                                   "/kv=" + std::to_string(kv),
                               {bytes, static_cast<double>(bytes) / sizeof(std::uint64_t)},
                               [=] { return std::make_unique<ReadLoop>(way, bytes); });
      }
    }
  }
}

} // namespace mixedkv::bench
