#include "attention/scores.h"

#include <algorithm>

namespace mixedkv {

void Scores::gather(const KeyRun &run) {
  if (!run.scattered()) {
    return;
  }
  for (int r = 0; r < num_rows_; ++r) {
    const float *from = by_token_ + r * ld_;
    float *to = by_key_ + r * ld_;
    for (int j = 0; j < run.size(); ++j) {
      to[j] = from[run.slot(j)];
    }
  }
}

void Scores::scatter(const KeyRun &run) {
  for (int r = 0; r < num_rows_; ++r) {
    float *to = by_token_ + r * ld_;
    if (run.scattered()) {
      const float *from = by_key_ + r * ld_;
      std::fill_n(to, run.num_tokens(), 0.0f);
      for (int j = 0; j < run.size(); ++j) {
        to[run.slot(j)] = from[j];
      }
    } else {
      std::fill_n(to, run.lead(), 0.0f);
      std::fill(to + run.lead() + run.size(), to + run.num_tokens(), 0.0f);
    }
  }
}

} // namespace mixedkv
