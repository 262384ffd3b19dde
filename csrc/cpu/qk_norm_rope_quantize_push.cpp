// Codes and scales of rope(rms_norm(q)) and rope(rms_norm(k)), and v as it is, each rank's heads into that rank's Q
// rows and ring slots.
#include <vector>

#include "../push.h"
#include "norm_rope.h"
#include "parallel.h"
#include "quantize_head.h"
#include "ring.h"

namespace lingbot::cpu::LINGBOT_ISA {
namespace {

// Heads `rotated` as codes and scales at their ranks' addresses.
void push_heads(const QkNormRopeQuantizePushParams& p, const float* rotated, const int64_t* codes_at,
                const int64_t* scales_at, int64_t codes_offset, int64_t scales_offset, int64_t scale_head) {
  const int heads_per_rank = p.heads / p.ranks;
  for (int h = 0; h < p.heads; ++h) {
    const int rank = h / heads_per_rank, own = h % heads_per_rank;
    int8_t* codes = reinterpret_cast<int8_t*>(codes_at[rank]) + codes_offset + int64_t{own} * p.head_dim;
    float* scales = reinterpret_cast<float*>(scales_at[rank]) + scales_offset;
    scales[own * scale_head] = quantize_head(rotated + int64_t{h} * p.head_dim, p.head_dim, codes);
  }
}

// `rotated` has room for two rows.
template <class T>
void push_token(const QkNormRopeQuantizePushParams& p, int64_t b, int64_t s, float* rotated) {
  const int64_t dim = int64_t{p.heads} * p.head_dim, token = p.first_token + s;
  const int64_t to = slot(p.ring, chunk_start(p.ring) + token);
  const int64_t *q_out = p.addresses, *q_scale = q_out + p.ranks, *k_out = q_scale + p.ranks;
  const int64_t *k_scale = k_out + p.ranks, *v_out = k_scale + p.ranks;
  const Rope rope{p.cos_sin + s * p.head_dim, p.heads, p.head_dim};
  NormRopeRow<T, float> rows[2];
  int num_rows = 0;
  rows[num_rows++] = {row<T>(p.k, b, s), static_cast<const T*>(p.k_weight), rotated, 0, p.heads};
  if (p.q.ptr != nullptr)
    rows[num_rows++] = {row<T>(p.q, b, s), static_cast<const T*>(p.q_weight), rotated + dim, 0, p.heads};
  norm_rope(rows, num_rows, rope, p.eps);
  push_heads(p, rotated, k_out, k_scale, b * p.k_cache_batch_stride + to * p.k_cache_token_stride,
             b * p.k_scale_batch_stride + to * p.k_scale_token_stride, p.k_scale_head_stride);
  if (p.q.ptr != nullptr)
    push_heads(p, rotated + dim, q_out, q_scale, b * p.q_out_batch_stride + token * p.q_out_token_stride,
               b * p.q_scale_batch_stride + token * p.q_scale_token_stride, p.q_scale_head_stride);
  const int64_t part = dim / p.ranks;
  const T* v = row<T>(p.v, b, s);
  for (int rank = 0; rank < p.ranks; ++rank) {
    T* out = reinterpret_cast<T*>(v_out[rank]) + b * p.v_cache_batch_stride + to * p.v_cache_token_stride;
    __builtin_memcpy(out, v + rank * part, sizeof(T) * part);
  }
}

Status check(const QkNormRopeQuantizePushParams& p) {
  if (Status status = check_heads(p.heads, p.head_dim)) return status;
  if (Status status = push_problem(p.ranks, p.heads, p.first_token)) return status;
  if (p.k.ptr == nullptr || p.v.ptr == nullptr || p.k_weight == nullptr) return "k, v and k_weight must not be null";
  if (p.q.ptr != nullptr && p.q_weight == nullptr) return "q needs q_weight";
  if (p.cos_sin == nullptr) return "cos_sin must not be null";
  if (Status status = check_ring(p.ring, p.first_token + p.tokens)) return status;
  return quantized_push_problem(p);
}

}  // namespace

Status qk_norm_rope_quantize_push(const QkNormRopeQuantizePushParams& p, int threads) {
  if (p.batch <= 0 || p.tokens <= 0) return nullptr;
  if (Status status = check(p)) return status;
  const int64_t dim = int64_t{p.heads} * p.head_dim;
  return with_dtype(p.dtype, [&](auto t) -> Status {
    parallel_for(p.batch * p.tokens, 5 * size_of(p.dtype) * dim, threads, [&](int64_t begin, int64_t end) {
      std::vector<float> rotated(2 * dim);
      for (int64_t i = begin; i < end; ++i) push_token<decltype(t)>(p, i / p.tokens, i % p.tokens, rotated.data());
    });
    return nullptr;
  });
}

}  // namespace lingbot::cpu::LINGBOT_ISA
