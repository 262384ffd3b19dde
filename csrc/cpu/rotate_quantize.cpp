// Rows of activations as int8 codes with a scale each, after signs and a Hadamard rotation of their channels.
#include "parallel.h"
#include "quantize.h"

namespace lingbot::cpu::LINGBOT_ISA {

Status rotate_quantize(const RotateQuantizeParams& p, int threads) {
  if (p.batch <= 0 || p.tokens <= 0) return nullptr;
  if (p.dim < 1) return "dim must be at least 1";
  if (p.x.ptr == nullptr) return "x must not be null";
  if (Status s = quantized_problem(p.out)) return s;
  return with_dtype(p.dtype, [&](auto t) -> Status {
    using T = decltype(t);
    parallel_for(p.batch * p.tokens, (sizeof(T) + 1) * p.dim, threads, [&](int64_t begin, int64_t end) {
      alignas(64) float kept[kKeptRow];
      for (int64_t row = begin; row < end; ++row) {
        const T* x =
            static_cast<const T*>(p.x.ptr) + row / p.tokens * p.x.batch_stride + row % p.tokens * p.x.token_stride;
        quantize_row(p.out, row, p.dim, kept, [&](int i, int count) LINGBOT_LAMBDA { return load(x + i, count); });
      }
    });
    return nullptr;
  });
}

}  // namespace lingbot::cpu::LINGBOT_ISA
