// y = T(T(x * rsqrt(mean(x^2) + eps)) * weight) over whole rows.
#include "norm_rope.h"
#include "parallel.h"

namespace lingbot::cpu::LINGBOT_ISA {

Status rms_norm(const RmsNormParams& p, int threads) {
  if (p.batch <= 0 || p.tokens <= 0) return nullptr;
  if (p.dim < 1) return "dim must be at least 1";
  if (p.x.ptr == nullptr || p.weight == nullptr || p.y == nullptr) return "x, weight and y must not be null";
  return with_dtype(p.dtype, [&](auto t) -> Status {
    using T = decltype(t);
    const T* weight = static_cast<const T*>(p.weight);
    parallel_for(p.batch * p.tokens, 2 * sizeof(T) * p.dim, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* x = row<T>(p.x, i / p.tokens, i % p.tokens);
        T* y = static_cast<T*>(p.y) + i * p.dim;
        const float inverse = inverse_rms(x, p.dim, p.eps);
        each_block(p.dim, [&](int j, int count)
                              LINGBOT_LAMBDA { store(y + j, normalise(x + j, weight + j, inverse, count), count); });
      }
    });
    return nullptr;
  });
}

}  // namespace lingbot::cpu::LINGBOT_ISA
