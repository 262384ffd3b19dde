// y = layer_norm(x) * (1 + scale) + shift
#include "layer_norm.h"
#include "parallel.h"

namespace lingbot::cpu::LINGBOT_ISA {

Status layer_norm_modulate(const LayerNormModulateParams& p, int threads) {
  if (p.batch <= 0 || p.tokens <= 0) return nullptr;
  if (p.dim < 1) return "dim must be at least 1";
  if (p.x == nullptr || p.y == nullptr) return "x and y must not be null";
  return with_dtypes(p.residual_dtype, p.dtype, [&](auto r, auto t) -> Status {
    using R = decltype(r);
    using T = decltype(t);
    const int64_t bytes = (sizeof(R) + sizeof(T)) * p.dim;
    parallel_for(p.batch * p.tokens, bytes, threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const R* x = static_cast<const R*>(p.x) + row * p.dim;
        T* y = static_cast<T*>(p.y) + row * p.dim;
        const float* scale = of_batch(p.scale, row / p.tokens);
        const float* shift = of_batch(p.shift, row / p.tokens);
        const float sum = sum_blocks(p.dim, [&](int i, int count) LINGBOT_LAMBDA { return load(x + i, count); });
        layer_norm(x, sum, p.dim, p.eps, y, [&](int i, int count, const Lanes& normalised) LINGBOT_LAMBDA {
          return modulate(normalised, scale, shift, i, count);
        });
      }
    });
    return nullptr;
  });
}

}  // namespace lingbot::cpu::LINGBOT_ISA
