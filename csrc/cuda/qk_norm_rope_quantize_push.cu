// Codes and scales of rope(rms_norm(q)) and rope(rms_norm(k)), and v, of this shard's tokens, each rank's heads
// straight into that rank's memory: norm, quantisation and the whole exchange in one pass.
#include "../push.h"
#include "norm_rope.cuh"

namespace lingbot::cuda {

inline GroupedCodesNormRopeParams kernel_params(const QkNormRopeQuantizePushParams& a) {
  GroupedCodesNormRopeParams p = {};
  p.dim = static_cast<uint32_t>(a.heads) * a.head_dim;
  p.groups = a.ranks;
  p.group_width = p.dim / a.ranks;
  const int64_t first = a.first_token, own_heads = a.heads / a.ranks;
  // A part whose rows lie at to[g] in each rank's memory, `skipped` elements of `size` bytes on.
  const auto add = [&](const Rows& in, const int64_t* to, int64_t size, int64_t out_batch, int64_t out_token,
                       int64_t skipped, const void* weight, bool to_ring) {
    for (int64_t g = 0; g < a.ranks; ++g) p.jump[p.parts][g] = (to[g] - to[0]) / size - g * p.group_width;
    void* out = reinterpret_cast<void*>(to[0] + skipped * size);
    p.part[p.parts++] = norm_rope_part(in, out, out_batch, out_token, weight, to_ring);
  };
  // Of the part that comes next.
  const auto scales = [&](const int64_t* to, int64_t batch, int64_t row, int64_t head, int64_t skipped) {
    const uint32_t n = p.parts;
    for (int64_t g = 0; g < a.ranks; ++g) p.scale_jump[n][g] = (to[g] - to[0]) / 4 - g * own_heads * head;
    p.scale[n] = reinterpret_cast<float*>(to[0]) + skipped;
    p.scale_batch[n] = batch, p.scale_row[n] = row, p.scale_head[n] = head;
  };
  const int64_t *q = a.addresses, *k = q + 2 * a.ranks, *v = k + 2 * a.ranks;
  if (a.q.ptr) {
    scales(q + a.ranks, a.q_scale_batch_stride, a.q_scale_token_stride, a.q_scale_head_stride,
           first * a.q_scale_token_stride);
    add(a.q, q, 1, a.q_out_batch_stride, a.q_out_token_stride, first * a.q_out_token_stride, a.q_weight, false);
  }
  scales(k + a.ranks, a.k_scale_batch_stride, a.k_scale_token_stride, a.k_scale_head_stride, 0);
  add(a.k, k, 1, a.k_cache_batch_stride, a.k_cache_token_stride, 0, a.k_weight, true);
  add(a.v, v, element_size(a.dtype), a.v_cache_batch_stride, a.v_cache_token_stride, 0, nullptr, true);
  p.cos_sin = a.cos_sin;
  p.ring = device_ring(a.ring, first);
  p.tokens = static_cast<uint32_t>(a.tokens);
  p.head_dim = a.head_dim;
  while (p.head_dim >> (p.head_shift + 1)) ++p.head_shift;
  p.inv_dim = 1.f / static_cast<float>(p.dim);
  p.eps = a.eps;
  return p;
}

Status qk_norm_rope_quantize_push(const QkNormRopeQuantizePushParams& a, void* stream) {
  if (Status s = norm_rope_shape(a.batch, a.tokens, a.heads, a.head_dim)) return s;
  if (Status s = push_problem(a.ranks, a.heads, a.first_token)) return s;
  if (a.batch == 0 || a.tokens == 0) return nullptr;
  if (!a.v.ptr || !a.k_weight) return "v and k_weight must be given";
  if (a.q.ptr && !a.q_weight) return "q needs q_weight";
  if (Status s = ring_problem(a.ring, a.first_token + a.tokens)) return s;
  if (Status s = quantized_push_problem(a)) return s;
  return launch_norm_rope<NormRopeTo::kGroupedCodes>(kernel_params(a), a.batch, a.dtype, stream);
}

}  // namespace lingbot::cuda
