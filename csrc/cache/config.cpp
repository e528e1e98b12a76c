#include "cache/config.h"

#include "cache/checks.h"
#include "rows/key_centers.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace mixedkv {
namespace {

constexpr std::int64_t kMaxCells = std::numeric_limits<std::int32_t>::max();
/// Every cell has a bit for each sequence, every layer a number: bounds far above any use.
constexpr int kMaxSequences = 1 << 16;
constexpr int kMaxLayers = 1 << 16;

/// Products and sums that know when they left the range of sizes in memory.
class Size {
public:
  Size(std::uint64_t value) : value_(value) {} // NOLINT: numbers are sizes
  Size operator*(const Size &b) const {
    return value_ != 0 && b.value_ > kMax / value_ ? Size(kMax + 1) : Size(value_ * b.value_);
  }
  Size operator+(const Size &b) const {
    return Size(std::min<std::uint64_t>(value_, kMax + 1) +
                std::min<std::uint64_t>(b.value_, kMax + 1));
  }
  bool fits() const { return value_ <= kMax; }

private:
  static constexpr std::uint64_t kMax = std::numeric_limits<std::ptrdiff_t>::max() / 4;
  std::uint64_t value_;
};

Size rows_size(const RowShape &shape, std::int64_t cells) {
  return (Size(shape.k_row_bytes()) + Size(shape.v_row_bytes())) *
         Size(static_cast<std::uint64_t>(shape.num_kv_heads)) *
         Size(static_cast<std::uint64_t>(shape.num_layers)) *
         Size(static_cast<std::uint64_t>(cells));
}

void check_size(const char *name, std::int64_t size, std::int64_t n_pad) {
  if (size < 1 || size % n_pad != 0 || size > kMaxCells) {
    refuse(name, "be a positive multiple of n_pad (" + std::to_string(n_pad) + ") below 2^31",
           size);
  }
}

void check_count(const char *name, int value, int most) {
  if (value < 1 || value > most) {
    refuse(name, "be at least 1 and at most " + std::to_string(most), value);
  }
}

void check_dim(const char *name, int dim, const char *type_name, Format type) {
  check(dim >= 1, name, "be at least 1", dim);
  if (!format_info(type).holds(dim)) {
    refuse(name,
           "be a multiple of " + std::to_string(format_info(type).block_values) + " where " +
               type_name + " is " + format_name(type),
           dim);
  }
}

void check_type(const char *name, Format type) {
  check(static_cast<int>(type) < kNumFormats, name, "be a format", static_cast<int>(type));
}

} // namespace

std::int64_t trigger_level(const CacheConfig &config) {
  return static_cast<std::int64_t>(
      std::floor(config.threshold * static_cast<double>(config.hot_size)));
}

std::int64_t cold_cells(const CacheConfig &config) {
  return config.quantize ? config.cold_size : 0;
}

std::vector<int> cached_layers(const CacheConfig &config) {
  std::vector<int> numbers(static_cast<std::size_t>(config.num_layers), -1);
  int next = 0;
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    if (config.layer_filter.empty() || config.layer_filter[i] != 0) {
      numbers[i] = next++;
    }
  }
  return numbers;
}

static RowShape tier_shape(const CacheConfig &config, Format k_type, Format v_type) {
  const auto skipped =
      std::count(config.layer_filter.begin(), config.layer_filter.end(), std::uint8_t{0});
  RowShape shape;
  shape.num_layers = config.num_layers - static_cast<int>(skipped);
  shape.num_kv_heads = config.num_kv_heads;
  shape.head_dim = config.head_dim;
  shape.head_dim_v = config.head_dim_v;
  shape.k_type = k_type;
  shape.v_type = v_type;
  shape.fit_scales = config.fit_scales;
  return shape;
}

RowShape hot_shape(const CacheConfig &config) {
  return tier_shape(config, config.hot_k_type, config.hot_v_type);
}

RowShape cold_shape(const CacheConfig &config) {
  RowShape shape = tier_shape(config, config.cold_k_type, config.cold_v_type);
  shape.center_keys = config.center_keys && !format_info(config.cold_k_type).plain();
  return shape;
}

void check_config(const CacheConfig &config) {
  check_count("num_layers", config.num_layers, kMaxLayers);
  check(config.num_kv_heads >= 1, "num_kv_heads", "be at least 1", config.num_kv_heads);
  check_count("n_seq_max", config.n_seq_max, kMaxSequences);
  check_type("hot_k_type", config.hot_k_type);
  check_type("hot_v_type", config.hot_v_type);
  check_type("cold_k_type", config.cold_k_type);
  check_type("cold_v_type", config.cold_v_type);
  check_dim("head_dim", config.head_dim, "hot_k_type", config.hot_k_type);
  check_dim("head_dim_v", config.head_dim_v, "hot_v_type", config.hot_v_type);
  if (config.quantize) {
    check_dim("head_dim", config.head_dim, "cold_k_type", config.cold_k_type);
    check_dim("head_dim_v", config.head_dim_v, "cold_v_type", config.cold_v_type);
  }
  if (config.quantize && config.center_keys && config.head_dim > KeyCenters::kMaxWidth) {
    refuse("head_dim",
           "be at most " + std::to_string(KeyCenters::kMaxWidth) + " where center_keys is on",
           config.head_dim);
  }
  check(config.n_pad >= 1, "n_pad", "be at least 1", config.n_pad);
  check_size("hot_size", config.hot_size, config.n_pad);
  if (config.quantize) {
    check_size("cold_size", config.cold_size, config.n_pad);
  }
  check(config.group_size >= 1, "group_size", "be at least 1", config.group_size);
  check(config.threshold > 0.0 && config.threshold <= 1.0, "threshold", "be above 0 and at most 1",
        config.threshold);
  check(config.window_left >= -1, "window_left", "be -1 (none) or at least 0", config.window_left);
  check(config.sink_tokens >= 0, "sink_tokens", "be at least 0", config.sink_tokens);
  check(config.hot_keep >= 0, "hot_keep", "be at least 0", config.hot_keep);
  const std::int64_t level = trigger_level(config);
  const std::int64_t pins = std::int64_t{config.sink_tokens} + config.hot_keep;
  if (config.quantize && pins > 0 && pins * config.n_seq_max >= level) {
    const bool newest = config.hot_keep > 0;
    const std::string beside =
        newest && config.sink_tokens > 0
            ? ", beside sink_tokens (" + std::to_string(config.sink_tokens) + ") and"
            : ",";
    refuse(newest ? "hot_keep" : "sink_tokens",
           "stay" + beside + " times n_seq_max (" + std::to_string(config.n_seq_max) +
               "), below floor(threshold * hot_size) = " + std::to_string(level),
           newest ? config.hot_keep : config.sink_tokens);
  }
  const std::size_t num_flags = config.layer_filter.size();
  if (num_flags != 0 && num_flags != static_cast<std::size_t>(config.num_layers)) {
    refuse("layer_filter",
           "have num_layers (" + std::to_string(config.num_layers) + ") entries or none",
           num_flags);
  }
  const RowShape hot = hot_shape(config);
  if (hot.num_layers == 0) {
    refuse("layer_filter", "keep one layer at least", "none");
  }
  // Rows, the journal's rows, and the owner sets, which alone grow with a square.
  const std::int64_t cold = cold_cells(config);
  const Size total =
      rows_size(hot, config.hot_size) * Size(config.quantize ? 2 : 1) +
      rows_size(cold_shape(config), cold) +
      Size(static_cast<std::uint64_t>(config.hot_size + cold)) *
          Size((static_cast<std::uint64_t>(config.n_seq_max) + 63) / 64 * sizeof(std::uint64_t));
  if (!total.fits()) {
    const std::string cold_name = config.quantize ? ", cold_size" : "";
    throw std::invalid_argument(
        "hot_size" + cold_name +
        ", num_layers, num_kv_heads, head_dim, n_seq_max: the product is more than memory can be, "
        "got hot_size " +
        std::to_string(config.hot_size) +
        (config.quantize ? cold_name + " " + std::to_string(cold) : "") + ", num_layers " +
        std::to_string(hot.num_layers) + ", num_kv_heads " + std::to_string(hot.num_kv_heads) +
        ", head_dim " + std::to_string(hot.head_dim) + ", head_dim_v " +
        std::to_string(hot.head_dim_v) + ", n_seq_max " + std::to_string(config.n_seq_max));
  }
}

} // namespace mixedkv
