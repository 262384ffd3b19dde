// Full-width RMSNorm, rotary embedding and the write to where attention reads: ring slots, q, an all-to-all buffer, or
// other ranks' memory. Device code of qk_norm_rope_kv_write, qk_norm_rope_quantize_kv_write, qk_norm_rope_pack,
// qk_norm_rope_push and qk_norm_rope_quantize_push.
#pragma once

#include "block.cuh"
#include "codes.cuh"
#include "launch.cuh"
#include "launch_config.h"
#include "ring.h"
#include "vec.cuh"

namespace lingbot::cuda {

// One of q, k, v: where its rows come from and go to. Strides in elements.
struct NormRopePart {
  const void* in;
  int64_t in_batch, in_token;
  void* out;
  int64_t out_batch, out_token;
  const void* weight;  // null: rows are copied as they are
  uint32_t to_ring;    // out rows are ring slots, not tokens
};

struct NormRopeParams {
  NormRopePart part[3];  // [q], k, [v]
  const float* cos_sin;  // [tokens, head_dim]
  DeviceRing ring;
  uint32_t tokens, parts, dim, head_dim;
  float inv_dim, eps;
};

// A row's heads go out in groups, one a rank: element e of group g lies jump[part][g] + e elements behind the part's
// row.
struct GroupedNormRopeParams : NormRopeParams {
  uint32_t group_width, groups;  // elements of a group
  int64_t jump[3][kMaxRanks];
};

// Normalised parts leave as int8 codes, with a scale for each head.
struct QuantizedNormRopeParams : NormRopeParams {
  float* scale[2];  // of the parts with a weight, which come first
  int64_t scale_batch[2], scale_row[2], scale_head[2];
  uint32_t head_shift;  // log2(head_dim), where vectors are used
};

// Both: element e of group g lies jump[part][g] + e elements behind the part's row, the scale of head h of group g
// scale_jump[part][g] + h * scale_head[part] behind the row's scales.
struct GroupedCodesNormRopeParams : QuantizedNormRopeParams {
  uint32_t group_width, groups;
  int64_t jump[3][kMaxRanks];
  int64_t scale_jump[2][kMaxRanks];
};

enum class NormRopeTo { kRows, kGroups, kCodes, kGroupedCodes };

template <NormRopeTo kTo>
inline constexpr bool kInCodes = kTo == NormRopeTo::kCodes || kTo == NormRopeTo::kGroupedCodes;
template <NormRopeTo kTo>
inline constexpr bool kInGroups = kTo == NormRopeTo::kGroups || kTo == NormRopeTo::kGroupedCodes;

template <NormRopeTo kTo>
using NormRopeParamsOf =
    std::conditional_t<kTo == NormRopeTo::kGroups, GroupedNormRopeParams,
                       std::conditional_t<kTo == NormRopeTo::kCodes, QuantizedNormRopeParams,
                                          std::conditional_t<kTo == NormRopeTo::kGroupedCodes,
                                                             GroupedCodesNormRopeParams, NormRopeParams>>>;

__device__ __forceinline__ int64_t out_offset(const NormRopeParams& p, const NormRopePart& part, uint32_t batch,
                                              uint32_t token) {
  const uint32_t row = part.to_ring ? ring_slot(p.ring, token) : token;
  return batch * part.out_batch + row * part.out_token;
}

// Element e of a row of a part, counted from the row's start in the output.
template <NormRopeTo kTo>
__device__ __forceinline__ int64_t group_offset(const NormRopeParamsOf<kTo>& p, uint32_t part, int e) {
  if constexpr (kInGroups<kTo>) return e + p.jump[part][static_cast<uint32_t>(e) / p.group_width];
  return e;
}

// What is added to where the codes, and the scales, of a row begin: of the head with element e.
template <NormRopeTo kTo>
__device__ __forceinline__ int64_t codes_jump(const NormRopeParamsOf<kTo>& p, uint32_t part, uint32_t e) {
  if constexpr (kInGroups<kTo>) return p.jump[part][e / p.group_width];
  return 0;
}

template <NormRopeTo kTo>
__device__ __forceinline__ int64_t scales_jump(const NormRopeParamsOf<kTo>& p, uint32_t part, uint32_t e) {
  if constexpr (kInGroups<kTo>) return p.scale_jump[part][e / p.group_width];
  return 0;
}

// a * b - c * d, within 1.5 ulp even where the products cancel: the rounding of c * d is added back. Where c * d is
// infinite the result is NaN; finite rows reach that in float16 only, where T(x * weight) is beyond 65504.
__device__ __forceinline__ float difference_of_products(float a, float b, float c, float d) {
  const float cd = __fmul_rn(c, d);
  return __fadd_rn(fmaf(a, b, -cd), fmaf(-c, d, cd));
}

// (a, b) <- (a cos - b sin, a sin + b cos)
__device__ __forceinline__ void rotate(float& a, float& b, float cos, float sin) {
  const float x = a, y = b;
  a = difference_of_products(x, cos, y, sin);
  b = difference_of_products(x, sin, -y, cos);
}

template <typename T, int V>
__device__ __forceinline__ float sum_of_squares(const Vec<T, V>& x) {
  float f[V];
  unpack(x, f);
  float even = f[0] * f[0], odd = f[1] * f[1];
#pragma unroll
  for (int i = 2; i < V; i += 2) even = fmaf(f[i], f[i], even), odd = fmaf(f[i + 1], f[i + 1], odd);
  return even + odd;
}

// f = rope(T(T(x * inv_rms) * weight)); cos and sin of the vector's V / 2 pairs.
template <typename T, int V>
__device__ __forceinline__ void norm_rotate(const Vec<T, V>& x, const Vec<T, V>& weight, float inv_rms,
                                            const float (&cos)[V / 2], const float (&sin)[V / 2], float (&f)[V]) {
  float w[V];
  unpack(x, f);
  unpack(weight, w);
#pragma unroll
  for (int i = 0; i < V; ++i) f[i] *= inv_rms;
  round_all<T>(f);
#pragma unroll
  for (int i = 0; i < V; ++i) f[i] *= w[i];
  round_all<T>(f);
#pragma unroll
  for (int i = 0; i < V / 2; ++i) rotate(f[2 * i], f[2 * i + 1], cos[i], sin[i]);
}

// Where the scales of a token's heads lie.
__device__ __forceinline__ float* head_scales(const QuantizedNormRopeParams& p, uint32_t which, uint32_t batch,
                                              uint32_t token) {
  const uint32_t row = p.part[which].to_ring ? ring_slot(p.ring, token) : token;
  return p.scale[which] + batch * p.scale_batch[which] + row * p.scale_row[which];
}

// Codes and scale of a head of which neighbouring threads hold V values each; all threads of a warp take part.
template <int V>
__device__ __forceinline__ void store_head(const QuantizedNormRopeParams& p, const float (&f)[V], int e, bool stored,
                                           int8_t* codes, float* scale, int64_t scale_head) {
  float most = 0.f;
#pragma unroll
  for (int j = 0; j < V; ++j) most = larger_magnitude(most, f[j]);
  uint32_t largest = __float_as_uint(most);  // as integers magnitudes keep their order, and a NaN is larger than Inf
  for (uint32_t apart = p.head_dim / (2 * V); apart > 0; apart /= 2)
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, apart));
  const float amax = __uint_as_float(largest);
  const Quantizer q = quantizer(amax);
  if (!stored) return;
  if ((e & (p.head_dim - 1)) == 0) scale[(e >> p.head_shift) * scale_head] = scale_of(amax);
  if constexpr (V == 8) __stcs(reinterpret_cast<uint2*>(codes + e), make_uint2(q.four(f), q.four(f + 4)));
  else __stcs(reinterpret_cast<uint32_t*>(codes + e), q.four(f));
}

// cos and sin of the pairs that element e of a row starts.
template <int N>
__device__ __forceinline__ void load_cos_sin(const NormRopeParams& p, uint32_t token, uint32_t e, float (&cos)[N],
                                             float (&sin)[N]) {
  const uint32_t half = p.head_dim / 2;
  const float* at = p.cos_sin + static_cast<int64_t>(token) * p.head_dim + (e % p.head_dim) / 2;
  unpack(load_cached<N>(at), cos);
  unpack(load_cached<N>(at + half), sin);
}

// A block is one row of one part, in registers, kVecs vectors a thread. threads * V must be a multiple of head_dim
// where kVecs > 1: a thread then meets one set of angles.
template <typename T, int V, int kVecs, int kThreads, int kMinBlocks, NormRopeTo kTo, LoadHint kLoad, StoreHint kStore>
__global__ void __launch_bounds__(kThreads == 0 ? max_row_threads(kVecs) : kThreads, kMinBlocks)
    norm_rope_rows(const __grid_constant__ NormRopeParamsOf<kTo> p) {
  __shared__ float shared[1][kMaxWarps];
  wait_for_previous_grid();
  allow_next_grid();
  const uint32_t token = p.parts == 3 ? blockIdx.x / 3 : p.parts == 2 ? blockIdx.x / 2 : blockIdx.x;
  const uint32_t which = blockIdx.x - token * p.parts;
  const NormRopePart& part = p.part[which];
  const uint32_t batch = blockIdx.y;

  const T* in = static_cast<const T*>(part.in) + batch * part.in_batch + token * part.in_token;
  Vec<T, V> x[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int e = row_element<V, kThreads>(i);
    x[i] = in_row<kThreads>(e, p.dim) ? load_stream<kLoad, V>(in + e) : zero_vec<T, V>();
  }
  T* out = static_cast<T*>(part.out) + out_offset(p, part, batch, token);
  if (!part.weight) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int e = row_element<V, kThreads>(i);
      if (in_row<kThreads>(e, p.dim)) store_vec<kStore>(out + group_offset<kTo>(p, which, e), x[i]);
    }
    return;
  }

  constexpr bool kHoldWeights = kVecs <= 2;  // else read after the sum, to save registers
  const T* weight = static_cast<const T*>(part.weight);
  Vec<T, V> w[kHoldWeights ? kVecs : 1];
  if constexpr (kHoldWeights) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int e = row_element<V, kThreads>(i);
      w[i] = in_row<kThreads>(e, p.dim) ? load_cached<V>(weight + e) : zero_vec<T, V>();
    }
  }
  float cos[V / 2], sin[V / 2];
  load_cos_sin(p, token, threadIdx.x * V, cos, sin);

  float sum[1] = {sum_of_squares(x[0])};
#pragma unroll
  for (int i = 1; i < kVecs; ++i) sum[0] += sum_of_squares(x[i]);
  row_sum(sum, shared);
  const float inv_rms = rsqrtf(sum[0] * p.inv_dim + p.eps);
  if constexpr (kInCodes<kTo>) {
    int8_t* codes = static_cast<int8_t*>(part.out) + out_offset(p, part, batch, token);
    float* scale = head_scales(p, which, batch, token);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int e = row_element<V, kThreads>(i);
      const bool inside = in_row<kThreads>(e, p.dim);  // heads are: their threads' answers are one
      keep_packed(x[i]);
      Vec<T, V> factor = zero_vec<T, V>();
      if constexpr (kHoldWeights) factor = w[i];
      else if (inside) factor = load_cached<V>(weight + e);
      float f[V];
      norm_rotate(x[i], factor, inv_rms, cos, sin, f);
      const uint32_t at = inside ? e : 0;
      store_head(p, f, e, inside, codes + codes_jump<kTo>(p, which, at), scale + scales_jump<kTo>(p, which, at),
                 p.scale_head[which]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int e = row_element<V, kThreads>(i);
      if (!in_row<kThreads>(e, p.dim)) continue;
      keep_packed(x[i]);
      const Vec<T, V> scale = kHoldWeights ? w[kHoldWeights ? i : 0] : load_cached<V>(weight + e);
      float f[V];
      norm_rotate(x[i], scale, inv_rms, cos, sin, f);
      store_vec<kStore>(out + group_offset<kTo>(p, which, e), pack<T, V>(f));
    }
  }
}

// The same for any even head_dim, any width, any alignment: a row is read twice, element by element.
template <typename T, NormRopeTo kTo>
__global__ void __launch_bounds__(256) norm_rope_any(const __grid_constant__ NormRopeParamsOf<kTo> p) {
  __shared__ float shared[1][kMaxWarps];
  wait_for_previous_grid();
  allow_next_grid();
  const uint32_t token = blockIdx.x / p.parts, which = blockIdx.x - token * p.parts, batch = blockIdx.y;
  const NormRopePart& part = p.part[which];
  const T* in = static_cast<const T*>(part.in) + batch * part.in_batch + token * part.in_token;
  T* out = static_cast<T*>(part.out) + out_offset(p, part, batch, token);
  if (!part.weight) {
    for (uint32_t e = threadIdx.x; e < p.dim; e += blockDim.x) out[group_offset<kTo>(p, which, e)] = in[e];
    return;
  }
  const T* weight = static_cast<const T*>(part.weight);
  const float* cos_sin = p.cos_sin + static_cast<int64_t>(token) * p.head_dim;
  float sum[1] = {0.f};
  for (uint32_t e = threadIdx.x; e < p.dim; e += blockDim.x) sum[0] = fmaf(to_float(in[e]), to_float(in[e]), sum[0]);
  row_sum(sum, shared);
  const float inv_rms = rsqrtf(sum[0] * p.inv_dim + p.eps);
  const auto rotated_pair = [&](uint32_t e) {
    float a = round_to<T>(round_to<T>(to_float(in[e]) * inv_rms) * to_float(weight[e]));
    float b = round_to<T>(round_to<T>(to_float(in[e + 1]) * inv_rms) * to_float(weight[e + 1]));
    const uint32_t pair = e % p.head_dim / 2;
    rotate(a, b, cos_sin[pair], cos_sin[p.head_dim / 2 + pair]);
    return make_float2(a, b);
  };
  if constexpr (kInCodes<kTo>) {  // warps take the heads in turn
    int8_t* row = static_cast<int8_t*>(part.out) + out_offset(p, part, batch, token);
    float* scale = head_scales(p, which, batch, token);
    const uint32_t lane = threadIdx.x & 31, heads = p.dim / p.head_dim;
    for (uint32_t head = threadIdx.x >> 5; head < heads; head += blockDim.x >> 5) {
      const uint32_t first = head * p.head_dim, end = first + p.head_dim;
      int8_t* codes = row + codes_jump<kTo>(p, which, first);
      float most = 0.f;
      for (uint32_t e = first + 2 * lane; e < end; e += 64) {
        const float2 u = rotated_pair(e);
        most = larger_magnitude(larger_magnitude(most, u.x), u.y);
      }
      const float amax = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(most)));
      const Quantizer q = quantizer(amax);
      if (lane == 0) scale[head * p.scale_head[which] + scales_jump<kTo>(p, which, first)] = scale_of(amax);
      for (uint32_t e = first + 2 * lane; e < end; e += 64) {
        const float2 u = rotated_pair(e);
        codes[e] = q.usable ? static_cast<int8_t>(q.code(u.x)) : 0;
        codes[e + 1] = q.usable ? static_cast<int8_t>(q.code(u.y)) : 0;
      }
    }
  } else {
    for (uint32_t e = 2 * threadIdx.x; e < p.dim; e += 2 * blockDim.x) {
      const float2 u = rotated_pair(e);
      T* at = out + group_offset<kTo>(p, which, e);
      at[0] = from_float<T>(u.x), at[1] = from_float<T>(u.y);
    }
  }
}

// The part of a row operand; absent operands have no part.
inline NormRopePart norm_rope_part(const Rows& in, void* out, int64_t out_batch, int64_t out_token, const void* weight,
                                   bool to_ring) {
  return {in.ptr, in.batch_stride, in.token_stride, out, out_batch, out_token, weight, to_ring ? 1u : 0u};
}

// Elements of a vector that every operand allows: 16 bytes, or 1.
template <NormRopeTo kTo>
int norm_rope_width(const NormRopeParamsOf<kTo>& p, int size) {
  const int width = 16 / size;
  bool ok = p.dim % width == 0 && p.head_dim % width == 0 && aligned(p.cos_sin, 16);
  for (uint32_t n = 0; n < p.parts; ++n) {
    const bool codes = kInCodes<kTo> && p.part[n].weight;
    ok = ok && rows_aligned(p.part[n].in, p.part[n].in_batch, p.part[n].in_token, size, 16) &&
         rows_aligned(p.part[n].out, p.part[n].out_batch, p.part[n].out_token, codes ? 1 : size, codes ? width : 16) &&
         aligned(p.part[n].weight, 16);
  }
  if constexpr (kInCodes<kTo>) {  // a head lies in neighbouring threads of one warp
    ok = ok && (p.head_dim & (p.head_dim - 1)) == 0 && p.head_dim / width <= 32;
  }
  if constexpr (kInGroups<kTo>) {
    ok = ok && p.group_width % width == 0;
    for (uint32_t n = 0; n < p.parts; ++n) {
      for (uint32_t g = 0; g < p.groups; ++g) ok = ok && p.jump[n][g] % width == 0;
    }
  }
  return ok ? width : 1;
}

// What a kernel reads of a shape, checked against what 32-bit indices and the grid can hold.
inline Status norm_rope_shape(int64_t batch, int64_t tokens, int32_t heads, int32_t head_dim) {
  if (heads < 1) return "heads must be positive";
  if (head_dim < 2 || head_dim % 2 != 0) return "head_dim must be even and positive";
  if (static_cast<int64_t>(heads) * head_dim > 1 << 24) return "heads * head_dim must be at most 2^24";
  if (batch < 0 || batch > kMaxGridYZ) return "batch must be in [0, 65535]";
  if (tokens < 0 || tokens > kMaxGridX / 3) return "tokens must be in [0, 2^31 / 3)";
  return nullptr;
}

template <NormRopeTo kTo>
Status launch_norm_rope(const NormRopeParamsOf<kTo>& p, int64_t batch, Dtype dtype, void* stream) {
  DeviceInfo device = {};
  if (Status s = device_info(&device)) return s;
  const bool overlap = device.capability >= 90;
  const RowConfig config = norm_rope_config(p.dim, p.head_dim, norm_rope_width<kTo>(p, element_size(dtype)));
  const dim3 grid(p.tokens * p.parts, static_cast<uint32_t>(batch)), block(config.threads);
  return with_type(dtype, [&](auto tag) -> Status {
    using T = typename decltype(tag)::type;
    return with_row_shape<T, T>(config, [&](auto shape) -> Status {
      using Shape = decltype(shape);
      if constexpr (Shape::V == 1) {
        return launch(norm_rope_any<T, kTo>, grid, block, 0, stream, overlap, p);
      } else {
        constexpr int kMinBlocks = Shape::kThreads == 160 ? (kInCodes<kTo> ? 6 : 8) : 1;
        // Streamed: attention reads the outputs once, together with far more than the L2 holds.
        return launch(norm_rope_rows<T, Shape::V, Shape::kVecs, Shape::kThreads, kMinBlocks, kTo, LoadHint::kNoAllocate,
                                     StoreHint::kStream>,
                      grid, block, 0, stream, overlap, p);
      }
    });
  });
}

// Rows in groups; defined once, in qk_norm_rope_pack.cu.
Status launch_grouped_norm_rope(const GroupedNormRopeParams& p, int64_t batch, Dtype dtype, void* stream);

}  // namespace lingbot::cuda
