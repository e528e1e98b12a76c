#include "cache/arguments.h"

#include "cache/checks.h"
#include "kernels/dispatch.h"
#include "rows/parallel_rows.h"
#include "rows/row_parts.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <string>

namespace mixedkv {
namespace {

/// Tokens of one head that a worker looks at in one go.
constexpr std::int64_t kLookTokens = 64;

const char *row_at(const RowsView &rows, std::int64_t head, std::int64_t token) {
  return static_cast<const char *>(rows.data) + head * rows.head_stride + token * rows.row_stride;
}

/// Whether all values are below limit in magnitude, NaN aside, and none is NaN where so asked.
bool all_below(const RowsView &rows, const StoredAs &as, double limit, bool no_nan) {
  const Kernels &kernels = active_kernels();
  const std::size_t width = static_cast<std::size_t>(as.width);
  const bool side_by_side =
      rows.row_stride == static_cast<std::ptrdiff_t>(row_bytes(rows.type, width));
  const std::int64_t blocks = (as.num_tokens + kLookTokens - 1) / kLookTokens;
  std::atomic<bool> below{true};
  parallel_rows(blocks * as.num_heads, as.num_heads * as.num_tokens * as.width,
                [&](std::int64_t unit) {
                  const std::int64_t head = unit / blocks;
                  const std::int64_t begin = unit % blocks * kLookTokens;
                  const std::int64_t end = std::min(begin + kLookTokens, as.num_tokens);
                  const std::int64_t step = side_by_side ? end - begin : 1;
                  for (std::int64_t token = begin; token < end; token += step) {
                    const std::size_t n = width * static_cast<std::size_t>(step);
                    each_part(rows.type, row_at(rows, head, token), n,
                              [&](const float *x, std::size_t count) {
                                if (!(kernels.largest_magnitude(x, count) < limit) ||
                                    (no_nan && !kernels.all_finite_f32(x, count))) {
                                  below.store(false, std::memory_order_relaxed);
                                }
                              });
                  }
                });
  return below.load();
}

/// Plain formats that hold a value, for a message.
std::string formats_for(double magnitude) {
  std::string names;
  for (const FormatInfo &info : kFormats) {
    if (info.plain() && info.keeps_finite(magnitude)) {
      names += (names.empty() ? "'" : " or '") + std::string(info.name) + "'";
    }
  }
  return names;
}

} // namespace

void check_tokens(const std::int64_t *pos, const TokenOwners &owners, std::int64_t n,
                  int n_seq_max) {
  check(n >= 1 && n <= std::numeric_limits<std::int32_t>::max(), "pos",
        "have at least 1 and fewer than 2^31 entries", n);
  if (pos == nullptr || owners.begin == nullptr || owners.ids == nullptr) {
    throw std::invalid_argument("pos and seq_id must not be null");
  }
  for (std::int64_t i = 0; i < n; ++i) {
    if (pos[i] < 0 || pos[i] > std::numeric_limits<std::int32_t>::max()) {
      refuse("pos[" + std::to_string(i) + "]", "be from 0 to 2^31 - 1", pos[i]);
    }
    const std::int64_t begin = owners.begin[i];
    const std::int64_t end = owners.begin[i + 1];
    if (begin < 0 || end <= begin) {
      refuse("seq_id[" + std::to_string(i) + "]", "name one sequence at least", end - begin);
    }
    for (std::int64_t j = begin; j < end; ++j) {
      if (owners.ids[j] < 0 || owners.ids[j] >= n_seq_max) {
        refuse("seq_id[" + std::to_string(i) + "]",
               "be a sequence id below n_seq_max (" + std::to_string(n_seq_max) + ")",
               owners.ids[j]);
      }
    }
  }
}

void check_rows(const char *name, const RowsView &rows, int width) {
  check(rows.data != nullptr, name, "not be null", "null");
  const int type = static_cast<int>(rows.type);
  check(type < kNumFormats, name, "be rows of a format", type);
  if (!format_info(rows.type).holds(width)) {
    refuse(name, "be of a format that holds rows of " + std::to_string(width) + " values",
           format_name(rows.type));
  }
}

void check_magnitudes(const char *name, const RowsView &rows, const StoredAs &as) {
  const auto limit_of = [](Format format) {
    const double limit = format_info(format).overflow;
    return limit == 0.0 ? std::numeric_limits<double>::infinity() : limit;
  };
  Format narrowest = as.hot;
  double limit = limit_of(as.hot);
  bool in_hot = true;
  if (as.cold && *as.cold != as.hot) {
    // A move converts what hot holds, which may be larger than what came.
    const double of_cold = (limit_of(*as.cold) - (as.centered ? kF16Overflow : 0.0)) /
                           (1.0 + format_info(as.hot).growth_of(as.fit_scales));
    if (of_cold < limit) {
      narrowest = *as.cold;
      limit = of_cold;
      in_hot = false;
    }
  }
  const bool changed = as.unchanged != nullptr;
  // A plain type that holds no more than the tiers' do is let through unseen.
  const bool harmless = format_info(rows.type).plain() && limit_of(rows.type) <= limit;
  if ((harmless && !changed) || all_below(rows, as, limit, changed)) {
    return;
  }
  const std::size_t width = static_cast<std::size_t>(as.width);
  const auto was_finite = [&](std::int64_t head, std::int64_t token) {
    bool finite = true;
    each_part(as.unchanged->type, row_at(*as.unchanged, head, token), width,
              [&](const float *x, std::size_t count) {
                finite = finite && active_kernels().all_finite_f32(x, count);
              });
    return finite;
  };
  for (std::int64_t head = 0; head < as.num_heads; ++head) {
    for (std::int64_t token = 0; token < as.num_tokens; ++token) {
      const auto look = [&](const float *x, std::size_t count) {
        const float *found = std::find_if(x, x + count, [&](float v) {
          return std::isfinite(v) ? std::fabs(v) >= limit : changed && was_finite(head, token);
        });
        if (found != x + count) {
          std::ostringstream message;
          message.precision(9);
          message << name << " of layer " << as.layer << (changed ? ", rotated," : "") << " holds "
                  << *found << " (head " << head << ", token " << token
                  << "), which would be infinite in rows of '" << format_name(narrowest)
                  << "', the type of its " << (in_hot ? "hot" : "cold")
                  << " tier: magnitudes must be below " << limit
                  << "; types that hold it: " << formats_for(std::fabs(*found));
          throw std::invalid_argument(message.str());
        }
      };
      each_part(rows.type, row_at(rows, head, token), width, look);
    }
  }
}

void check_queries(const QueryView &q, int num_qo_heads, const OutputView &out,
                   std::int64_t num_tokens, int num_kv_heads) {
  check(q.data != nullptr, "q", "not be null", "null");
  check(q.type == Format::f32 || q.type == Format::f16, "q", "be f32 or f16", format_name(q.type));
  if (q.len != num_tokens) {
    refuse("q", "have a row for each of the slot's " + std::to_string(num_tokens) + " tokens",
           q.len);
  }
  if (q.index != nullptr || out.index != nullptr) {
    throw std::invalid_argument("q and out must not be indexed");
  }
  if (num_qo_heads < 1 || num_qo_heads % num_kv_heads != 0) {
    refuse("num_qo_heads",
           "be a positive multiple of num_kv_heads (" + std::to_string(num_kv_heads) + ")",
           num_qo_heads);
  }
  check(out.data != nullptr, "out", "not be null", "null");
}

void check_options(const AttendOptions &options, std::int64_t window_left) {
  check(std::isfinite(options.sm_scale), "sm_scale", "be finite", options.sm_scale);
  check(std::isfinite(options.logits_soft_cap) &&
            (options.logits_soft_cap == 0.0f ||
             options.logits_soft_cap >= std::numeric_limits<float>::min()),
        "logits_soft_cap", "be 0 (none), or finite and 2^-126 or more", options.logits_soft_cap);
  check(window_left >= -1, "window_left", "be -1 (none) or at least 0", window_left);
}

} // namespace mixedkv
