// x_out = x + delta * gate, rounded; y = layer_norm(x_out) * (1 + scale) + shift
#include "layer_norm.h"
#include "parallel.h"

namespace lingbot::cpu::LINGBOT_ISA {

Status residual_norm_modulate(const ResidualNormModulateParams& p, int threads) {
  if (p.batch <= 0 || p.tokens <= 0) return nullptr;
  if (p.dim < 1) return "dim must be at least 1";
  if (p.x == nullptr || p.delta == nullptr || p.x_out == nullptr || p.y == nullptr)
    return "x, delta, x_out and y must not be null";
  return with_dtypes(p.residual_dtype, p.dtype, [&](auto r, auto t) -> Status {
    using R = decltype(r);
    using T = decltype(t);
    const int64_t bytes = 2 * (sizeof(R) + sizeof(T)) * p.dim;
    parallel_for(p.batch * p.tokens, bytes, threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const R* x = static_cast<const R*>(p.x) + row * p.dim;
        const T* delta = static_cast<const T*>(p.delta) + row * p.dim;
        R* x_out = static_cast<R*>(p.x_out) + row * p.dim;
        T* y = static_cast<T*>(p.y) + row * p.dim;
        const float* gate = of_batch(p.gate, row / p.tokens);
        const float* scale = of_batch(p.scale, row / p.tokens);
        const float* shift = of_batch(p.shift, row / p.tokens);
        const float sum = residual_row(x, delta, gate, p.dim, x_out);
        layer_norm(x_out, sum, p.dim, p.eps, y, [&](int i, int count, const Lanes& normalised) LINGBOT_LAMBDA {
          return modulate(normalised, scale, shift, i, count);
        });
      }
    });
    return nullptr;
  });
}

}  // namespace lingbot::cpu::LINGBOT_ISA
