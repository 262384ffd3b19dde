// out = softmax(q_scale * k_scale * (q k^T) * softmax_scale) v: scores from exact int32 sums, a query of a head at a
// time.
#include <cmath>
#include <vector>

#include "dtype.h"
#include "parallel.h"

namespace lingbot::cpu::LINGBOT_ISA {
namespace {

LINGBOT_INLINE int32_t score(const int8_t* q, const int8_t* k, int count) {
  int32_t sum = 0;
  for (int i = 0; i < count; ++i) sum += int32_t{q[i]} * k[i];
  return sum;
}

struct Sources {
  const int8_t *q, *k;
  const BFloat16* v;
  const float *q_scale, *k_scale;
};

// `weights`: room for one float a key.
void attend(const Int8AttentionParams& p, int64_t batch, int64_t query, int head, float* weights) {
  const int64_t first = int64_t{head} * p.head_dim;
  const Sources at = {
      static_cast<const int8_t*>(p.q.ptr) + batch * p.q.batch_stride + query * p.q.token_stride + first,
      static_cast<const int8_t*>(p.k_cache.ptr) + batch * p.k_cache.batch_stride + first,
      static_cast<const BFloat16*>(p.v_cache.ptr) + batch * p.v_cache.batch_stride + first,
      p.q_scale + batch * p.q_scale_batch_stride + query * p.q_scale_token_stride + head * p.q_scale_head_stride,
      p.k_scale + batch * p.k_scale_batch_stride + head * p.k_scale_head_stride,
  };
  const float scale = *at.q_scale * static_cast<float>(p.softmax_scale);
  float largest = -INFINITY, sum = 0.0f;
  for (int64_t n = 0; n < p.keys; ++n) {
    const int32_t exact = score(at.q, at.k + n * p.k_cache.token_stride, p.head_dim);
    weights[n] = static_cast<float>(exact) * at.k_scale[n * p.k_scale_token_stride] * scale;
    if (n == p.keys - 1) weights[n] += static_cast<float>(std::log(p.last_key_count));
    if (weights[n] > largest) largest = weights[n];
  }
  for (int64_t n = 0; n < p.keys; ++n) sum += weights[n] = std::exp(weights[n] - largest);
  BFloat16* out = static_cast<BFloat16*>(p.out) + (batch * p.queries + query) * p.heads * p.head_dim + first;
  each_block(p.head_dim, [&](int i, int count) LINGBOT_LAMBDA {
    Lanes total = load(at.v + i, count) * weights[0];
    for (int64_t n = 1; n < p.keys; ++n)
      total = total + load(at.v + n * p.v_cache.token_stride + i, count) * weights[n];
    store(out + i, total * (1.0f / sum), count);
  });
  p.lse[(batch * p.heads + head) * p.queries + query] = largest + std::log(sum);
}

}  // namespace

Status int8_attention(const Int8AttentionParams& p, int threads) {
  if (p.batch <= 0 || p.queries <= 0) return nullptr;
  if (p.keys < 1) return "keys must be at least 1";
  if (p.heads < 1 || p.head_dim < 1) return "heads and head_dim must be at least 1";
  if (p.q.ptr == nullptr || p.k_cache.ptr == nullptr || p.v_cache.ptr == nullptr || p.q_scale == nullptr ||
      p.k_scale == nullptr || p.out == nullptr || p.lse == nullptr) {
    return "every operand but the workspace must be there";
  }
  const int64_t rows = p.queries * p.heads;
  parallel_for(p.batch * rows, p.keys * p.head_dim * 3, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> weights(static_cast<size_t>(p.keys));
    for (int64_t i = begin; i < end; ++i) {
      attend(p, i / rows, i % rows / p.heads, static_cast<int>(i % p.heads), weights.data());
    }
  });
  return nullptr;
}

}  // namespace lingbot::cpu::LINGBOT_ISA
