// x_out = x + delta * gate, rounded
#include "layer_norm.h"
#include "parallel.h"

namespace lingbot::cpu::LINGBOT_ISA {

Status gated_residual(const GatedResidualParams& p, int threads) {
  if (p.batch <= 0 || p.tokens <= 0) return nullptr;
  if (p.dim < 1) return "dim must be at least 1";
  if (p.x == nullptr || p.delta == nullptr || p.x_out == nullptr) return "x, delta and x_out must not be null";
  return with_dtypes(p.residual_dtype, p.dtype, [&](auto r, auto t) -> Status {
    using R = decltype(r);
    using T = decltype(t);
    const int64_t bytes = (2 * sizeof(R) + sizeof(T)) * p.dim;
    parallel_for(p.batch * p.tokens, bytes, threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const R* x = static_cast<const R*>(p.x) + row * p.dim;
        const T* delta = static_cast<const T*>(p.delta) + row * p.dim;
        R* x_out = static_cast<R*>(p.x_out) + row * p.dim;
        const float* gate = of_batch(p.gate, row / p.tokens);
        each_block(p.dim, [&](int i, int count)
                              LINGBOT_LAMBDA { store(x_out + i, add_gated(x, delta, gate, i, count), count); });
      }
    });
    return nullptr;
  });
}

}  // namespace lingbot::cpu::LINGBOT_ISA
