// RMSNorm and RoPE of q and k, and v as it is, into [ranks, tokens, batch, parts, heads / ranks, head_dim].
#include "norm_rope.h"
#include "parallel.h"

namespace lingbot::cpu::LINGBOT_ISA {
namespace {

template <class T>
void pack_token(const QkNormRopePackParams& p, int64_t b, int64_t s) {
  const int heads_per_rank = p.heads / p.ranks;
  const int64_t part = int64_t{heads_per_rank} * p.head_dim;
  const int parts = p.q.ptr != nullptr ? 3 : 2;
  const int64_t rank_stride = p.tokens * p.batch * parts * part;
  T* out = static_cast<T*>(p.out) + (s * p.batch + b) * parts * part;
  const Rope rope{p.cos_sin + s * p.head_dim, p.heads, p.head_dim};
  NormRopeRow<T> rows[2];
  int num_rows = 0;
  if (p.q.ptr != nullptr) {
    rows[num_rows++] = {row<T>(p.q, b, s), static_cast<const T*>(p.q_weight), out, rank_stride, heads_per_rank};
    out += part;
  }
  rows[num_rows++] = {row<T>(p.k, b, s), static_cast<const T*>(p.k_weight), out, rank_stride, heads_per_rank};
  out += part;
  norm_rope(rows, num_rows, rope, p.eps);
  const T* v = row<T>(p.v, b, s);
  for (int rank = 0; rank < p.ranks; ++rank)
    __builtin_memcpy(out + rank * rank_stride, v + rank * part, sizeof(T) * part);
}

Status check(const QkNormRopePackParams& p) {
  if (Status status = check_heads(p.heads, p.head_dim)) return status;
  if (p.ranks < 1 || p.heads % p.ranks != 0) return "ranks must divide heads";
  if (p.k.ptr == nullptr || p.v.ptr == nullptr || p.k_weight == nullptr) return "k, v and k_weight must not be null";
  if (p.q.ptr != nullptr && p.q_weight == nullptr) return "q needs q_weight";
  if (p.cos_sin == nullptr || p.out == nullptr) return "cos_sin and out must not be null";
  return nullptr;
}

}  // namespace

Status qk_norm_rope_pack(const QkNormRopePackParams& p, int threads) {
  if (p.batch <= 0 || p.tokens <= 0) return nullptr;
  if (Status status = check(p)) return status;
  const int64_t row_bytes = size_of(p.dtype) * p.heads * p.head_dim;
  return with_dtype(p.dtype, [&](auto t) -> Status {
    parallel_for(p.batch * p.tokens, 6 * row_bytes, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack_token<decltype(t)>(p, i % p.batch, i / p.batch);
    });
    return nullptr;
  });
}

}  // namespace lingbot::cpu::LINGBOT_ISA
