// x_out = x + delta * gate, rounded; codes and scale of layer_norm(x_out) * (1 + scale) + shift
#include "layer_norm.h"
#include "parallel.h"
#include "quantize.h"

namespace lingbot::cpu::LINGBOT_ISA {

Status residual_norm_modulate_quantize(const ResidualNormModulateQuantizeParams& p, int threads) {
  if (p.batch <= 0 || p.tokens <= 0) return nullptr;
  if (p.dim < 1) return "dim must be at least 1";
  if (p.x == nullptr || p.delta == nullptr || p.x_out == nullptr) return "x, delta and x_out must not be null";
  if (Status s = quantized_problem(p.out)) return s;
  return with_dtypes(p.residual_dtype, p.dtype, [&](auto r, auto t) -> Status {
    using R = decltype(r);
    using T = decltype(t);
    const int64_t bytes = (2 * sizeof(R) + sizeof(T) + 1) * p.dim;
    parallel_for(p.batch * p.tokens, bytes, threads, [&](int64_t begin, int64_t end) {
      alignas(64) float kept[kKeptRow];
      for (int64_t row = begin; row < end; ++row) {
        const R* x = static_cast<const R*>(p.x) + row * p.dim;
        const T* delta = static_cast<const T*>(p.delta) + row * p.dim;
        R* x_out = static_cast<R*>(p.x_out) + row * p.dim;
        const float* scale = of_batch(p.scale, row / p.tokens);
        const float* shift = of_batch(p.shift, row / p.tokens);
        const float sum = residual_row(x, delta, of_batch(p.gate, row / p.tokens), p.dim, x_out);
        const Moments m = moments_of(x_out, sum, p.dim, p.eps);
        quantize_row(p.out, row, p.dim, kept, [&](int i, int count) LINGBOT_LAMBDA {
          return modulate(normalised(x_out, m, i, count), scale, shift, i, count);
        });
      }
    });
    return nullptr;
  });
}

}  // namespace lingbot::cpu::LINGBOT_ISA
