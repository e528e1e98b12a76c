#include "bandwidth.h"

#include "../kernels/cpu_features.h"
#include "../parallel.h"
#include "timing.h"

#include <algorithm>
#include <cstring>

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
const char *const kWayNames[kNumWays] = {"1 stream", "1 stream, prefetched", "4 streams"};

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

} // namespace

ReadLoop::ReadLoop(std::size_t bytes)
    : memory_(round_up(bytes, kPage)),
      piece_(round_up((memory_.size() + kPieces - 1) / kPieces, kPage)),
      num_pieces_(static_cast<std::int64_t>((memory_.size() + piece_ - 1) / piece_)),
      sums_(static_cast<std::size_t>(num_pieces_)) {}

const char *ReadLoop::way() const { return kWayNames[std::max(way_, 0)]; }

void ReadLoop::prepare(const Context &context) {
  if (way_ >= 0) {
    return;
  }
  double best[kNumWays] = {};
  read(0, context.threads);
  for (int round = 0; round < 6; ++round) {
    for (int way = 0; way < kNumWays; ++way) {
      const double begin = now();
      read(way, context.threads);
      const double seconds = now() - begin;
      best[way] = round == 0 ? seconds : std::min(best[way], seconds);
    }
  }
  way_ = static_cast<int>(std::min_element(best, best + kNumWays) - best);
}

void ReadLoop::run(const Context &context) { read(way_, context.threads); }

void ReadLoop::read(int way, int threads) {
  Read *const read_piece = ways().read[way];
  parallel_for(num_pieces_, threads, [&](std::int64_t unit) {
    const std::size_t begin = static_cast<std::size_t>(unit) * piece_;
    sums_[static_cast<std::size_t>(unit)] =
        read_piece(memory_.as<char>() + begin, std::min(piece_, memory_.size() - begin));
  });
}

float ReadLoop::result() const { return static_cast<float>(sums_[0]); }

} // namespace mixedkv::bench
