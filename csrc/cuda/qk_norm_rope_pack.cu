// rope(rms_norm(q)), rope(rms_norm(k)) and v into one all-to-all buffer [ranks, tokens, batch, parts, heads / ranks,
// head_dim]: what each rank receives is contiguous.
#include "norm_rope.cuh"

namespace lingbot::cuda {

inline GroupedNormRopeParams kernel_params(const QkNormRopePackParams& a) {
  GroupedNormRopeParams p = {};
  p.dim = static_cast<uint32_t>(a.heads) * a.head_dim;
  p.parts = a.q.ptr ? 3 : 2;
  const int64_t width = p.dim / a.ranks, out_batch = p.parts * width, out_token = a.batch * out_batch;
  char* out = static_cast<char*>(a.out);
  const int64_t part_bytes = width * element_size(a.dtype);
  uint32_t n = 0;
  if (a.q.ptr) p.part[n] = norm_rope_part(a.q, out, out_batch, out_token, a.q_weight, false), ++n;
  p.part[n] = norm_rope_part(a.k, out + n * part_bytes, out_batch, out_token, a.k_weight, false), ++n;
  p.part[n] = norm_rope_part(a.v, out + n * part_bytes, out_batch, out_token, nullptr, false);
  p.cos_sin = a.cos_sin;
  p.group_width = static_cast<uint32_t>(width);
  p.groups = a.ranks;
  for (uint32_t part = 0; part < p.parts; ++part) {
    for (int g = 0; g < a.ranks; ++g) p.jump[part][g] = g * (a.tokens * out_token - width);
  }
  p.tokens = static_cast<uint32_t>(a.tokens);
  p.head_dim = a.head_dim;
  p.inv_dim = 1.f / static_cast<float>(p.dim);
  p.eps = a.eps;
  return p;
}

Status launch_grouped_norm_rope(const GroupedNormRopeParams& p, int64_t batch, Dtype dtype, void* stream) {
  return launch_norm_rope<NormRopeTo::kGroups>(p, batch, dtype, stream);
}

Status qk_norm_rope_pack(const QkNormRopePackParams& a, void* stream) {
  if (Status s = norm_rope_shape(a.batch, a.tokens, a.heads, a.head_dim)) return s;
  if (a.ranks < 1 || a.heads % a.ranks != 0) return "ranks must divide heads";
  if (a.ranks > kMaxRanks) return "ranks must be at most 64";
  if (a.batch == 0 || a.tokens == 0) return nullptr;
  if (!a.v.ptr) return "v must be given";
  return launch_grouped_norm_rope(kernel_params(a), a.batch, a.dtype, stream);
}

}  // namespace lingbot::cuda
