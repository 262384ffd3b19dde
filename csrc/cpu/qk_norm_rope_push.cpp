// RMSNorm and RoPE of q and k, and v as it is, each rank's heads into that rank's Q rows and ring slots.
#include "../push.h"
#include "norm_rope.h"
#include "parallel.h"
#include "ring.h"

namespace lingbot::cpu::LINGBOT_ISA {
namespace {

template <class T>
void push_token(const QkNormRopePushParams& p, int64_t b, int64_t s) {
  const int heads_per_rank = p.heads / p.ranks;
  const int64_t part = int64_t{heads_per_rank} * p.head_dim, token = p.first_token + s;
  const int64_t to = slot(p.ring, chunk_start(p.ring) + token);
  const int64_t *q_out = p.addresses, *k_out = q_out + p.ranks, *v_out = k_out + p.ranks;
  const Rope rope{p.cos_sin + s * p.head_dim, p.heads, p.head_dim};
  NormRopeRow<T> rows[2];
  int num_rows = 0;
  if (p.q.ptr != nullptr) {
    rows[num_rows++] = {row<T>(p.q, b, s),
                        static_cast<const T*>(p.q_weight),
                        nullptr,
                        0,
                        heads_per_rank,
                        q_out,
                        b * p.q_out_batch_stride + token * p.q_out_token_stride};
  }
  rows[num_rows++] = {row<T>(p.k, b, s),
                      static_cast<const T*>(p.k_weight),
                      nullptr,
                      0,
                      heads_per_rank,
                      k_out,
                      b * p.k_cache_batch_stride + to * p.k_cache_token_stride};
  norm_rope(rows, num_rows, rope, p.eps);
  const T* v = row<T>(p.v, b, s);
  for (int rank = 0; rank < p.ranks; ++rank) {
    T* out = reinterpret_cast<T*>(v_out[rank]) + b * p.v_cache_batch_stride + to * p.v_cache_token_stride;
    __builtin_memcpy(out, v + rank * part, sizeof(T) * part);
  }
}

Status check(const QkNormRopePushParams& p) {
  if (Status status = check_heads(p.heads, p.head_dim)) return status;
  if (Status status = push_problem(p.ranks, p.heads, p.first_token)) return status;
  if (p.k.ptr == nullptr || p.v.ptr == nullptr || p.k_weight == nullptr) return "k, v and k_weight must not be null";
  if (p.q.ptr != nullptr && p.q_weight == nullptr) return "q needs q_weight";
  if (p.cos_sin == nullptr) return "cos_sin must not be null";
  if (Status status = check_ring(p.ring, p.first_token + p.tokens)) return status;
  const int first = p.q.ptr == nullptr ? p.ranks : 0;
  return addresses_problem(p.addresses == nullptr ? nullptr : p.addresses + first, 3 * p.ranks - first, p.dtype);
}

}  // namespace

Status qk_norm_rope_push(const QkNormRopePushParams& p, int threads) {
  if (p.batch <= 0 || p.tokens <= 0) return nullptr;
  if (Status status = check(p)) return status;
  const int64_t row_bytes = size_of(p.dtype) * p.heads * p.head_dim;
  return with_dtype(p.dtype, [&](auto t) -> Status {
    parallel_for(p.batch * p.tokens, 6 * row_bytes, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) push_token<decltype(t)>(p, i / p.tokens, i % p.tokens);
    });
    return nullptr;
  });
}

}  // namespace lingbot::cpu::LINGBOT_ISA
