// rope(rms_norm(q)), rope(rms_norm(k)) and v of this shard's tokens, each rank's heads straight into that rank's
// memory: Q rows and ring slots. Where ranks reach each other's memory this is the norm and the whole exchange in one
// pass.
#include "../push.h"
#include "norm_rope.cuh"

namespace lingbot::cuda {

inline GroupedNormRopeParams kernel_params(const QkNormRopePushParams& a) {
  GroupedNormRopeParams p = {};
  p.dim = static_cast<uint32_t>(a.heads) * a.head_dim;
  p.groups = a.ranks;
  p.group_width = p.dim / a.ranks;
  const int64_t size = element_size(a.dtype);
  const auto add = [&](const Rows& in, const int64_t* to, int64_t out_batch, int64_t out_token, const void* weight,
                       bool to_ring) {
    const int64_t base = to[0] + (to_ring ? 0 : a.first_token * out_token * size);
    for (int64_t g = 0; g < a.ranks; ++g) p.jump[p.parts][g] = (to[g] - to[0]) / size - g * p.group_width;
    p.part[p.parts++] = norm_rope_part(in, reinterpret_cast<void*>(base), out_batch, out_token, weight, to_ring);
  };
  if (a.q.ptr) add(a.q, a.addresses, a.q_out_batch_stride, a.q_out_token_stride, a.q_weight, false);
  add(a.k, a.addresses + a.ranks, a.k_cache_batch_stride, a.k_cache_token_stride, a.k_weight, true);
  add(a.v, a.addresses + 2 * a.ranks, a.v_cache_batch_stride, a.v_cache_token_stride, nullptr, true);
  p.cos_sin = a.cos_sin;
  p.ring = device_ring(a.ring, a.first_token);
  p.tokens = static_cast<uint32_t>(a.tokens);
  p.head_dim = a.head_dim;
  p.inv_dim = 1.f / static_cast<float>(p.dim);
  p.eps = a.eps;
  return p;
}

Status qk_norm_rope_push(const QkNormRopePushParams& a, void* stream) {
  if (Status s = norm_rope_shape(a.batch, a.tokens, a.heads, a.head_dim)) return s;
  if (Status s = push_problem(a.ranks, a.heads, a.first_token)) return s;
  if (a.batch == 0 || a.tokens == 0) return nullptr;
  if (!a.v.ptr) return "v must be given";
  if (Status s = ring_problem(a.ring, a.first_token + a.tokens)) return s;
  const int first = a.q.ptr ? 0 : a.ranks;
  if (Status s = addresses_problem(a.addresses ? a.addresses + first : nullptr, 3 * a.ranks - first, a.dtype)) return s;
  return launch_grouped_norm_rope(kernel_params(a), a.batch, a.dtype, stream);
}

}  // namespace lingbot::cuda
