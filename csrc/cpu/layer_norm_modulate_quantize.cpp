// codes and scale of layer_norm(x) * (1 + scale) + shift
#include "layer_norm.h"
#include "parallel.h"
#include "quantize.h"

namespace lingbot::cpu::LINGBOT_ISA {

Status layer_norm_modulate_quantize(const LayerNormModulateQuantizeParams& p, int threads) {
  if (p.batch <= 0 || p.tokens <= 0) return nullptr;
  if (p.dim < 1) return "dim must be at least 1";
  if (p.x == nullptr) return "x must not be null";
  if (Status s = quantized_problem(p.out)) return s;
  return with_dtype(p.residual_dtype, [&](auto r) -> Status {
    using R = decltype(r);
    parallel_for(p.batch * p.tokens, (sizeof(R) + 1) * p.dim, threads, [&](int64_t begin, int64_t end) {
      alignas(64) float kept[kKeptRow];
      for (int64_t row = begin; row < end; ++row) {
        const R* x = static_cast<const R*>(p.x) + row * p.dim;
        const float* scale = of_batch(p.scale, row / p.tokens);
        const float* shift = of_batch(p.shift, row / p.tokens);
        const float sum = sum_blocks(p.dim, [&](int i, int count) LINGBOT_LAMBDA { return load(x + i, count); });
        const Moments m = moments_of(x, sum, p.dim, p.eps);
        quantize_row(p.out, row, p.dim, kept, [&](int i, int count) LINGBOT_LAMBDA {
          return modulate(normalised(x, m, i, count), scale, shift, i, count);
        });
      }
    });
    return nullptr;
  });
}

}  // namespace lingbot::cpu::LINGBOT_ISA
