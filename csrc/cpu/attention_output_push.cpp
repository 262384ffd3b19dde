// Attention's output for this rank's heads into the rows of the ranks that own the tokens: a pure copy.
#include "../push.h"
#include "dtype.h"
#include "parallel.h"

namespace lingbot::cpu::LINGBOT_ISA {

Status attention_output_push(const AttentionOutputPushParams& p, int threads) {
  if (p.batch <= 0 || p.tokens <= 0 || p.width <= 0) return nullptr;
  if (Status status = push_problem(p.ranks, p.ranks, 0)) return status;
  if (p.attended.ptr == nullptr || p.batch_strides == nullptr) return "attended and batch_strides must not be null";
  if (Status status = ends_problem(p.ends, p.ranks, p.tokens)) return status;
  if (Status status = addresses_problem(p.addresses, p.ranks, p.dtype, p.ends)) return status;
  return with_dtype(p.dtype, [&](auto t) -> Status {
    using T = decltype(t);
    const int64_t bytes = sizeof(T) * p.width;
    parallel_for(p.batch * p.tokens, 2 * bytes, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / p.tokens, s = i % p.tokens;
        int rank = 0;
        while (s >= p.ends[rank]) ++rank;
        const int64_t row = s - (rank == 0 ? 0 : p.ends[rank - 1]);
        const T* from =
            static_cast<const T*>(p.attended.ptr) + b * p.attended.batch_stride + s * p.attended.token_stride;
        T* to = reinterpret_cast<T*>(p.addresses[rank]) + b * p.batch_strides[rank] + row * p.token_stride + p.column;
        __builtin_memcpy(to, from, bytes);
      }
    });
    return nullptr;
  });
}

}  // namespace lingbot::cpu::LINGBOT_ISA
