// Rows with a layer norm: statistics in float32 in two passes, and the residual sums in front of them.
#pragma once

#include "dtype.h"

namespace lingbot::cpu::LINGBOT_ISA {
namespace {

LINGBOT_INLINE const float* of_batch(const Modulation& m, int64_t batch) {
  return m.ptr == nullptr ? nullptr : m.ptr + batch * m.batch_stride;
}

// x + delta * gate, gate null: 1
template <class R, class T>
LINGBOT_INLINE Lanes add_gated(const R* x, const T* delta, const float* gate, int i, int count) {
  const Lanes d = load(delta + i, count);
  return load(x + i, count) + (gate == nullptr ? d : d * load(gate + i, count));
}

// The rounded x_out = x + delta * gate, and its sum.
template <class R, class T>
LINGBOT_INLINE float residual_row(const R* x, const T* delta, const float* gate, int n, R* x_out) {
  return sum_blocks(n, [&](int i, int count) LINGBOT_LAMBDA {
    const Lanes rounded = round_to<R>(add_gated(x, delta, gate, i, count));
    store(x_out + i, rounded, count);
    return rounded;
  });
}

// The same with a camera: x_out = (1 + cam_scale) * (x + delta * gate) + cam_shift; cam_scale null: as residual_row.
template <class R, class T>
LINGBOT_INLINE float camera_row(const R* x, const T* delta, const float* gate, const T* cam_scale, const T* cam_shift,
                                int n, R* x_out) {
  return sum_blocks(n, [&](int i, int count) LINGBOT_LAMBDA {
    Lanes v = add_gated(x, delta, gate, i, count);
    if (cam_scale != nullptr) v = (load(cam_scale + i, count) + 1.0f) * v + load(cam_shift + i, count);
    v = round_to<R>(v);
    store(x_out + i, v, count);
    return v;
  });
}

struct Moments {
  float mean, inverse;
};

// Of a row whose sum is known.
template <class R>
LINGBOT_INLINE Moments moments_of(const R* x, float sum, int n, float eps) {
  const float mean = sum / static_cast<float>(n);
  const float squares = sum_blocks(n, [&](int i, int count) LINGBOT_LAMBDA {
    const Lanes centred = keep(load(x + i, count) - mean, count);
    return centred * centred;
  });
  return {mean, 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps)};
}

// (x[i] - mean) * rsqrt(var + eps)
template <class R>
LINGBOT_INLINE Lanes normalised(const R* x, const Moments& m, int i, int count) {
  return (load(x + i, count) - m.mean) * m.inverse;
}

// y[i] = affine(i, count, (x[i] - mean) * rsqrt(var + eps)), where `sum` is the row's.
template <class R, class T, class Affine>
LINGBOT_INLINE void layer_norm(const R* x, float sum, int n, float eps, T* y, const Affine& affine) {
  const Moments m = moments_of(x, sum, n, eps);
  each_block(
      n, [&](int i, int count) LINGBOT_LAMBDA { store(y + i, affine(i, count, normalised(x, m, i, count)), count); });
}

// normalised * (1 + scale) + shift; null: 0
LINGBOT_INLINE Lanes modulate(const Lanes& x, const float* scale, const float* shift, int i, int count) {
  Lanes y = x;
  if (scale != nullptr) y = y * (load(scale + i, count) + 1.0f);
  if (shift != nullptr) y = y + load(shift + i, count);
  return y;
}

}  // namespace
}  // namespace lingbot::cpu::LINGBOT_ISA
