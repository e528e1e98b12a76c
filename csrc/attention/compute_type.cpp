#include "attention/compute_type.h"

#include "attention/call.h"
#include "attention/sizes.h"
#include "kernels/dispatch.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace mixedkv {
namespace {

/// bf16 must be this much faster to be worth its error, and not what the clock happened to say.
constexpr double kWorthIt = 0.9;
constexpr int kRounds = 5;
/// From this difference on one round tells.
constexpr double kPlain = 2.0;

/// A full tile over a run of f16 keys and values, as in the midst of a prefill; one thread.
class Trial {
public:
  Trial() {
    std::uint32_t random = 1;
    const auto small = [&random] { // f16, 1 to 2 in magnitude
      random = random * 1664525u + 1013904223u;
      return static_cast<f16_t>((random >> 16 & 0x83ffu) | 0x3c00u);
    };
    std::generate(q_.begin(), q_.end(), small);
    std::generate(k_.begin(), k_.end(), small);
    std::generate(v_.begin(), v_.end(), small);
    constexpr std::ptrdiff_t row = kDim * sizeof(f16_t);
    segment_.k = k_.data();
    segment_.v = v_.data();
    segment_.k_format = segment_.v_format = Format::f16;
    segment_.k_row_stride = segment_.v_row_stride = row;
    segment_.len = kKeys;
    problem_.q.data = q_.data();
    problem_.q.type = Format::f16;
    problem_.q.row_stride = row;
    problem_.q.len = kTileRows;
    problem_.segments = &segment_;
    problem_.num_segments = 1;
    problem_.out.data = out_.data();
    problem_.out.row_stride = kDim;
    params_.head_dim = params_.head_dim_v = kDim;
    params_.sm_scale = 0.125f;
    params_.num_threads = 1;
  }

  double seconds(ComputeType type) {
    using Clock = std::chrono::steady_clock;
    params_.compute_type = type;
    const Clock::time_point begin = Clock::now();
    attend_unchecked(&problem_, 1, params_);
    return std::chrono::duration<double>(Clock::now() - begin).count();
  }

private:
  static constexpr int kKeys = kChunkKeys;
  static constexpr int kDim = 64;
  std::vector<f16_t> q_ = std::vector<f16_t>(std::size_t{kTileRows} * kDim);
  std::vector<f16_t> k_ = std::vector<f16_t>(std::size_t{kKeys} * kDim);
  std::vector<f16_t> v_ = std::vector<f16_t>(std::size_t{kKeys} * kDim);
  std::vector<float> out_ = std::vector<float>(std::size_t{kTileRows} * kDim);
  KeySegment segment_;
  AttentionProblem problem_;
  AttentionParams params_;
};

ComputeType measure() {
  Trial trial;
  double f32 = trial.seconds(ComputeType::f32);
  double bf16 = trial.seconds(ComputeType::bf16);
  for (int round = 1; round < kRounds && f32 < kPlain * bf16 && bf16 < kPlain * f32; ++round) {
    f32 = std::min(f32, trial.seconds(ComputeType::f32));
    bf16 = std::min(bf16, trial.seconds(ComputeType::bf16));
  }
  return bf16 < kWorthIt * f32 ? ComputeType::bf16 : ComputeType::f32;
}

/// What the environment says, read once.
std::optional<ComputeType> from_environment() {
  static const std::optional<ComputeType> pinned = []() -> std::optional<ComputeType> {
    const char *text = std::getenv("MIXEDKV_COMPUTE_TYPE");
    const std::string name = text != nullptr ? text : "";
    if (name.empty()) {
      return std::nullopt;
    }
    if (name != "f32" && name != "bf16") {
      throw std::invalid_argument("MIXEDKV_COMPUTE_TYPE must be 'f32' or 'bf16', got '" + name +
                                  "'");
    }
    return name == "f32" ? ComputeType::f32 : ComputeType::bf16;
  }();
  return pinned;
}

} // namespace

ComputeType auto_compute_type() {
  const std::optional<ComputeType> pinned = from_environment();
  const Kernels *kernels = &active_kernels();
  if (kernels->bf16 == nullptr) {
    return ComputeType::f32;
  }
  if (pinned) {
    return *pinned;
  }
  struct Measured {
    const Kernels *kernels;
    ComputeType type;
  };
  static std::mutex mutex;
  static std::vector<Measured> all;
  // Held while it is measured: others who ask want the answer, and would disturb the clock.
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Measured &one : all) {
    if (one.kernels == kernels) {
      return one.type;
    }
  }
  all.push_back({kernels, measure()});
  return all.back().type;
}

ComputeType settled_compute_type(const AttentionProblem *problems, int num_problems,
                                 const AttentionParams &params) {
  if (params.compute_type != ComputeType::automatic) {
    return params.compute_type;
  }
  const std::int64_t group = params.num_qo_heads / params.num_kv_heads;
  const bool any = std::any_of(problems, problems + num_problems, [&](const auto &problem) {
    return problem.q.len > 1 && problem.q.len * group >= kUnpackRows;
  });
  return any ? auto_compute_type() : ComputeType::f32;
}

} // namespace mixedkv
