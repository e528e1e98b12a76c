#include "rows/key_centers.h"

#include "kernels/dispatch.h"

namespace mixedkv {
namespace {

/// The largest f16.
constexpr float kMostOfCenter = 65504.0f;

} // namespace

KeyCenters::KeyCenters(int num_layers, int num_heads, int width, std::int64_t num_cells)
    : num_heads_(num_heads), width_(width), num_units_(std::int64_t{num_layers} * num_heads),
      num_pages_((num_cells + kCenterCells - 1) / kCenterCells),
      values_(static_cast<std::size_t>(num_units_ * num_pages_ * width_)),
      chosen_(static_cast<std::size_t>(num_pages_ * num_units_)) {}

void KeyCenters::forget(std::int64_t page) noexcept {
  std::fill_n(chosen_.data() + page * num_units_, num_units_, std::uint8_t{0});
}

KeyCenters::Mean::Mean(int width) : width_(static_cast<std::size_t>(width)) {
  std::fill_n(sum_, width_, 0.0f);
}

void KeyCenters::Mean::take(const float *values) noexcept {
  const Kernels &kernels = active_kernels();
  if (kernels.all_finite_f32(values, width_)) {
    kernels.axpy(1.0f, values, sum_, width_);
    ++count_;
  }
}

void KeyCenters::Mean::round_to(f16_t *center) noexcept {
  const Kernels &kernels = active_kernels();
  kernels.scale(sum_, width_, count_ > 0 ? 1.0f / static_cast<float>(count_) : 0.0f);
  for (std::size_t i = 0; i < width_; ++i) {
    sum_[i] = std::min(std::max(sum_[i], -kMostOfCenter), kMostOfCenter);
  }
  kernels.of(Format::f16).from_f32(sum_, center, width_);
}

void KeyCenters::subtract(int layer, int head, std::int64_t cell, float *values) const noexcept {
  const Kernels &kernels = active_kernels();
  const std::size_t width = static_cast<std::size_t>(width_);
  alignas(64) float center[kMaxWidth];
  kernels.of(Format::f16).to_f32(of(layer, head, cell / kCenterCells), center, width);
  kernels.axpy(-1.0f, center, values, width);
}

void KeyCenters::add(int layer, int head, std::int64_t cell, float *values) const noexcept {
  const Kernels &kernels = active_kernels();
  const std::size_t width = static_cast<std::size_t>(width_);
  alignas(64) float center[kMaxWidth];
  kernels.of(Format::f16).to_f32(of(layer, head, cell / kCenterCells), center, width);
  kernels.axpy(1.0f, center, values, width);
}

} // namespace mixedkv
