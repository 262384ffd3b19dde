// x_out = (1 + cam_scale) * (x + delta * gate) + cam_shift, rounded once; y = layer_norm(x_out) * weight + bias
#include "layer_norm.h"
#include "parallel.h"

namespace lingbot::cpu::LINGBOT_ISA {

Status gated_residual_camera_norm(const GatedResidualCameraNormParams& p, int threads) {
  if (p.batch <= 0 || p.tokens <= 0) return nullptr;
  if (p.dim < 1) return "dim must be at least 1";
  if (p.x == nullptr || p.delta == nullptr || p.x_out == nullptr || p.y == nullptr)
    return "x, delta, x_out and y must not be null";
  if (p.weight == nullptr || p.bias == nullptr) return "weight and bias must not be null";
  if ((p.cam_scale == nullptr) != (p.cam_shift == nullptr)) return "cam_scale and cam_shift come together";
  return with_dtypes(p.residual_dtype, p.dtype, [&](auto r, auto t) -> Status {
    using R = decltype(r);
    using T = decltype(t);
    const T* weight = static_cast<const T*>(p.weight);
    const T* bias = static_cast<const T*>(p.bias);
    const int64_t bytes = (2 * sizeof(R) + (p.cam_scale == nullptr ? 2 : 4) * sizeof(T)) * p.dim;
    parallel_for(p.batch * p.tokens, bytes, threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const R* x = static_cast<const R*>(p.x) + row * p.dim;
        const T* delta = static_cast<const T*>(p.delta) + row * p.dim;
        const T* cam_scale = p.cam_scale == nullptr ? nullptr : static_cast<const T*>(p.cam_scale) + row * p.dim;
        const T* cam_shift = p.cam_shift == nullptr ? nullptr : static_cast<const T*>(p.cam_shift) + row * p.dim;
        R* x_out = static_cast<R*>(p.x_out) + row * p.dim;
        T* y = static_cast<T*>(p.y) + row * p.dim;
        const float* gate = of_batch(p.gate, row / p.tokens);
        const float sum = camera_row(x, delta, gate, cam_scale, cam_shift, p.dim, x_out);
        layer_norm(x_out, sum, p.dim, p.eps, y, [&](int i, int count, const Lanes& normalised) LINGBOT_LAMBDA {
          return normalised * load(weight + i, count) + load(bias + i, count);
        });
      }
    });
    return nullptr;
  });
}

}  // namespace lingbot::cpu::LINGBOT_ISA
