// Codes and scales of rope(rms_norm(q)) and, in K's ring slot, of rope(rms_norm(k)); V's ring slot = v. One pass over
// memory; with q absent, the write-only kernel.
#include "norm_rope.cuh"

namespace lingbot::cuda {

inline QuantizedNormRopeParams kernel_params(const QkNormRopeQuantizeKvWriteParams& a) {
  QuantizedNormRopeParams p = {};
  p.dim = static_cast<uint32_t>(a.heads) * a.head_dim;
  const auto add = [&p](const NormRopePart& part, float* scale, int64_t batch, int64_t row, int64_t head) {
    p.scale[p.parts] = scale;
    p.scale_batch[p.parts] = batch, p.scale_row[p.parts] = row, p.scale_head[p.parts] = head;
    p.part[p.parts++] = part;
  };
  if (a.q.ptr) {
    const int64_t token = p.dim;
    add(norm_rope_part(a.q, a.q_codes, a.tokens * token, token, a.q_weight, false), a.q_scale, a.tokens * a.heads,
        a.heads, 1);
  }
  add(norm_rope_part(a.k, a.k_cache.ptr, a.k_cache.batch_stride, a.k_cache.token_stride, a.k_weight, true), a.k_scale,
      a.k_scale_batch_stride, a.k_scale_token_stride, a.k_scale_head_stride);
  if (a.v.ptr) {
    p.part[p.parts++] =
        norm_rope_part(a.v, a.v_cache.ptr, a.v_cache.batch_stride, a.v_cache.token_stride, nullptr, true);
  }
  p.cos_sin = a.cos_sin;
  p.ring = device_ring(a.ring);
  p.tokens = static_cast<uint32_t>(a.tokens);
  p.head_dim = a.head_dim;
  while (p.head_dim >> (p.head_shift + 1)) ++p.head_shift;
  p.inv_dim = 1.f / static_cast<float>(p.dim);
  p.eps = a.eps;
  return p;
}

Status qk_norm_rope_quantize_kv_write(const QkNormRopeQuantizeKvWriteParams& a, void* stream) {
  if (Status s = norm_rope_shape(a.batch, a.tokens, a.heads, a.head_dim)) return s;
  if (a.batch == 0 || a.tokens == 0) return nullptr;
  if (Status s = ring_problem(a.ring, a.tokens)) return s;
  if (!a.k_weight || !a.k_scale) return "k_weight and k_scale must not be null";
  if (a.q.ptr && (!a.q_weight || !a.q_codes || !a.q_scale)) return "q needs q_weight, q_codes and q_scale";
  return launch_norm_rope<NormRopeTo::kCodes>(kernel_params(a), a.batch, a.dtype, stream);
}

}  // namespace lingbot::cuda
