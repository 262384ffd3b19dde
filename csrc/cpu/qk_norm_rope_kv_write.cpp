// q_out = rope(rms_norm(q)); K's ring slot = rope(rms_norm(k)); V's ring slot = v. Without q: write-only.
#include "norm_rope.h"
#include "parallel.h"
#include "ring.h"

namespace lingbot::cpu::LINGBOT_ISA {
namespace {

template <class T>
void write_token(const QkNormRopeKvWriteParams& p, int64_t b, int64_t s) {
  const int64_t to = slot(p.ring, chunk_start(p.ring) + s);
  const Rope rope{p.cos_sin + s * p.head_dim, p.heads, p.head_dim};
  NormRopeRow<T> rows[2];
  int num_rows = 0;
  if (p.q.ptr != nullptr) {
    T* q_out = static_cast<T*>(p.q_out.ptr) + b * p.q_out.batch_stride + s * p.q_out.token_stride;
    rows[num_rows++] = {row<T>(p.q, b, s), static_cast<const T*>(p.q_weight), q_out, 0, p.heads};
  }
  rows[num_rows++] = {row<T>(p.k, b, s), static_cast<const T*>(p.k_weight), cache_row<T>(p.k_cache, b, to), 0, p.heads};
  norm_rope(rows, num_rows, rope, p.eps);
  if (p.v.ptr != nullptr)
    __builtin_memcpy(cache_row<T>(p.v_cache, b, to), row<T>(p.v, b, s), sizeof(T) * p.heads * p.head_dim);
}

Status check(const QkNormRopeKvWriteParams& p) {
  if (Status status = check_heads(p.heads, p.head_dim)) return status;
  if (p.k.ptr == nullptr || p.k_weight == nullptr) return "k and k_weight must not be null";
  if (p.q.ptr != nullptr && (p.q_weight == nullptr || p.q_out.ptr == nullptr)) return "q needs q_weight and q_out";
  if (p.cos_sin == nullptr || p.k_cache.ptr == nullptr) return "cos_sin and k_cache must not be null";
  if (p.v.ptr != nullptr && p.v_cache.ptr == nullptr) return "v needs v_cache";
  return check_ring(p.ring, p.tokens);
}

}  // namespace

Status qk_norm_rope_kv_write(const QkNormRopeKvWriteParams& p, int threads) {
  if (p.batch <= 0 || p.tokens <= 0) return nullptr;
  if (Status status = check(p)) return status;
  const int64_t row_bytes = size_of(p.dtype) * p.heads * p.head_dim;
  return with_dtype(p.dtype, [&](auto t) -> Status {
    parallel_for(p.batch * p.tokens, 6 * row_bytes, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) write_token<decltype(t)>(p, i / p.tokens, i % p.tokens);
    });
    return nullptr;
  });
}

}  // namespace lingbot::cpu::LINGBOT_ISA
