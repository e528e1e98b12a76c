#include "cache/arguments.h"

#include "cache/checks.h"

#include <cmath>
#include <limits>
#include <string>

namespace mixedkv {

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

void check_rows(const char *name, const RowsView &rows) {
  check(rows.data != nullptr, name, "not be null", "null");
  check(rows.type == Format::f32 || rows.type == Format::f16, name, "be rows of f32 or f16",
        format_name(rows.type));
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
  check(std::isfinite(options.logits_soft_cap) && options.logits_soft_cap >= 0.0f,
        "logits_soft_cap", "be 0 (none) or positive and finite", options.logits_soft_cap);
  check(window_left >= -1, "window_left", "be -1 (none) or at least 0", window_left);
}

} // namespace mixedkv
