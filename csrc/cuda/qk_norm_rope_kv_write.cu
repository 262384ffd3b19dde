// q_out = rope(rms_norm(q)); K's ring slot = rope(rms_norm(k)); V's ring slot = v. One pass over memory; with q absent,
// the write-only kernel.
#include "norm_rope.cuh"

namespace lingbot::cuda {

inline NormRopeParams kernel_params(const QkNormRopeKvWriteParams& a) {
  NormRopeParams p = {};
  p.dim = static_cast<uint32_t>(a.heads) * a.head_dim;
  if (a.q.ptr) {
    p.part[p.parts++] = norm_rope_part(a.q, a.q_out.ptr, a.q_out.batch_stride, a.q_out.token_stride, a.q_weight, false);
  }
  p.part[p.parts++] =
      norm_rope_part(a.k, a.k_cache.ptr, a.k_cache.batch_stride, a.k_cache.token_stride, a.k_weight, true);
  if (a.v.ptr) {
    p.part[p.parts++] =
        norm_rope_part(a.v, a.v_cache.ptr, a.v_cache.batch_stride, a.v_cache.token_stride, nullptr, true);
  }
  p.cos_sin = a.cos_sin;
  p.ring = device_ring(a.ring);
  p.tokens = static_cast<uint32_t>(a.tokens);
  p.head_dim = a.head_dim;
  p.inv_dim = 1.f / static_cast<float>(p.dim);
  p.eps = a.eps;
  return p;
}

Status qk_norm_rope_kv_write(const QkNormRopeKvWriteParams& a, void* stream) {
  if (Status s = norm_rope_shape(a.batch, a.tokens, a.heads, a.head_dim)) return s;
  if (a.batch == 0 || a.tokens == 0) return nullptr;
  if (Status s = ring_problem(a.ring, a.tokens)) return s;
  return launch_norm_rope<NormRopeTo::kRows>(kernel_params(a), a.batch, a.dtype, stream);
}

}  // namespace lingbot::cuda
