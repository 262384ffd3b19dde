// Codes and scales of rope(rms_norm(q)) and, in K's ring slot, of rope(rms_norm(k)); V's ring slot = v. Without q:
// write-only.
#include <vector>

#include "norm_rope.h"
#include "parallel.h"
#include "quantize_head.h"
#include "ring.h"

namespace lingbot::cpu::LINGBOT_ISA {
namespace {

// `rotated` has room for two rows.
template <class T>
void write_token(const QkNormRopeQuantizeKvWriteParams& p, int64_t b, int64_t s, float* rotated) {
  const int64_t to = slot(p.ring, chunk_start(p.ring) + s), dim = int64_t{p.heads} * p.head_dim;
  const Rope rope{p.cos_sin + s * p.head_dim, p.heads, p.head_dim};
  NormRopeRow<T, float> rows[2];
  int num_rows = 0;
  rows[num_rows++] = {row<T>(p.k, b, s), static_cast<const T*>(p.k_weight), rotated, 0, p.heads};
  if (p.q.ptr != nullptr)
    rows[num_rows++] = {row<T>(p.q, b, s), static_cast<const T*>(p.q_weight), rotated + dim, 0, p.heads};
  norm_rope(rows, num_rows, rope, p.eps);
  int8_t* k_codes = cache_row<int8_t>(p.k_cache, b, to);
  float* k_scale = p.k_scale + b * p.k_scale_batch_stride + to * p.k_scale_token_stride;
  for (int64_t h = 0; h < p.heads; ++h) {
    k_scale[h * p.k_scale_head_stride] = quantize_head(rotated + h * p.head_dim, p.head_dim, k_codes + h * p.head_dim);
    if (p.q.ptr == nullptr) continue;
    const int64_t index = (b * p.tokens + s) * p.heads + h;
    p.q_scale[index] = quantize_head(rotated + dim + h * p.head_dim, p.head_dim, p.q_codes + index * p.head_dim);
  }
  if (p.v.ptr != nullptr) __builtin_memcpy(cache_row<T>(p.v_cache, b, to), row<T>(p.v, b, s), sizeof(T) * dim);
}

Status check(const QkNormRopeQuantizeKvWriteParams& p) {
  if (Status status = check_heads(p.heads, p.head_dim)) return status;
  if (p.k.ptr == nullptr || p.k_weight == nullptr) return "k and k_weight must not be null";
  if (p.q.ptr != nullptr && (p.q_weight == nullptr || p.q_codes == nullptr || p.q_scale == nullptr))
    return "q needs q_weight, q_codes and q_scale";
  if (p.cos_sin == nullptr || p.k_cache.ptr == nullptr || p.k_scale == nullptr)
    return "cos_sin, k_cache and k_scale must not be null";
  if (p.v.ptr != nullptr && p.v_cache.ptr == nullptr) return "v needs v_cache";
  return check_ring(p.ring, p.tokens);
}

}  // namespace

Status qk_norm_rope_quantize_kv_write(const QkNormRopeQuantizeKvWriteParams& p, int threads) {
  if (p.batch <= 0 || p.tokens <= 0) return nullptr;
  if (Status status = check(p)) return status;
  const int64_t dim = int64_t{p.heads} * p.head_dim;
  return with_dtype(p.dtype, [&](auto t) -> Status {
    parallel_for(p.batch * p.tokens, 5 * size_of(p.dtype) * dim, threads, [&](int64_t begin, int64_t end) {
      std::vector<float> rotated(2 * dim);
      for (int64_t i = begin; i < end; ++i) write_token<decltype(t)>(p, i / p.tokens, i % p.tokens, rotated.data());
    });
    return nullptr;
  });
}

}  // namespace lingbot::cpu::LINGBOT_ISA
