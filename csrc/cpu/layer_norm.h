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

// y[i] = affine(i, count, (x[i] - mean) * rsqrt(var + eps)), where `sum` is the row's.
template <class R, class T, class Affine>
LINGBOT_INLINE void layer_norm(const R* x, float sum, int n, float eps, T* y, const Affine& affine) {
  const float mean = sum / static_cast<float>(n);
  const float squares = sum_blocks(n, [&](int i, int count) LINGBOT_LAMBDA {
    const Lanes centred = keep(load(x + i, count) - mean, count);
    return centred * centred;
  });
  const float inverse = 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps);
  each_block(n, [&](int i, int count) LINGBOT_LAMBDA {
    store(y + i, affine(i, count, (load(x + i, count) - mean) * inverse), count);
  });
}

// normalised * (1 + scale) + shift; null: 0
LINGBOT_INLINE Lanes modulate(const Lanes& normalised, const float* scale, const float* shift, int i, int count) {
  Lanes y = normalised;
  if (scale != nullptr) y = y * (load(scale + i, count) + 1.0f);
  if (shift != nullptr) y = y + load(shift + i, count);
  return y;
}

}  // namespace
}  // namespace lingbot::cpu::LINGBOT_ISA
