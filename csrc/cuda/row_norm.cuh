// What the norms over a row share: statistics of a row held in registers, modulation vectors, and the limits of a
// launch.
#pragma once

#include "block.cuh"
#include "launch.cuh"
#include "vec.cuh"

namespace lingbot::cuda {

struct RowMoments {
  float mean, inv_std;
};

// Mean, then variance around it, of a row in registers. `shared` serves one call a barrier pair: two calls in a loop
// are fine.
template <int kThreads, typename R, int V, int kVecs>
__device__ __forceinline__ RowMoments row_moments(Vec<R, V> (&x)[kVecs], uint32_t dim, float inv_dim, float eps,
                                                  float (&shared)[2][1][kMaxWarps]) {
  float sum[1] = {0.f};
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {  // vectors beyond the row are zero
    float f[V], part = 0.f;
    unpack(x[i], f);
#pragma unroll
    for (int j = 0; j < V; ++j) part += f[j];
    sum[0] += part;
  }
  row_sum(sum, shared[0]);
  const float mean = sum[0] * inv_dim;
  sum[0] = 0.f;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if (!in_row<kThreads>(row_element<V, kThreads>(i), dim)) continue;
    float f[V], part = 0.f;
    unpack(x[i], f);
#pragma unroll
    for (int j = 0; j < V; ++j) part = fmaf(f[j] - mean, f[j] - mean, part);
    sum[0] += part;
  }
  row_sum(sum, shared[1]);
  return {mean, rsqrtf(sum[0] * inv_dim + eps)};
}

// The same of a row in memory, read twice, element by element.
template <typename R>
__device__ RowMoments row_moments_any(const R* row, uint32_t dim, float inv_dim, float eps,
                                      float (&shared)[2][1][kMaxWarps]) {
  float sum[1] = {0.f};
  for (uint32_t e = threadIdx.x; e < dim; e += blockDim.x) sum[0] += to_float(row[e]);
  row_sum(sum, shared[0]);
  const float mean = sum[0] * inv_dim;
  sum[0] = 0.f;
  for (uint32_t e = threadIdx.x; e < dim; e += blockDim.x) {
    const float d = to_float(row[e]) - mean;
    sum[0] = fmaf(d, d, sum[0]);
  }
  row_sum(sum, shared[1]);
  return {mean, rsqrtf(sum[0] * inv_dim + eps)};
}

// V elements of a per-channel float32 vector; `absent` where there is none.
template <int V>
__device__ __forceinline__ void load_modulation(const float* channels, int e, float absent, float (&value)[V]) {
  if (channels) {
    unpack(load_cached<V>(channels + e), value);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) value[i] = absent;
  }
}

__device__ __forceinline__ float modulation_at(const float* channels, uint32_t e, float absent) {
  return channels ? channels[e] : absent;
}

// A modulation vector of one batch row.
__device__ __forceinline__ const float* batch_channels(const Modulation& m, uint32_t batch) {
  return m.ptr ? m.ptr + batch * m.batch_stride : nullptr;
}

inline bool modulation_aligned(const Modulation& m) { return aligned(m.ptr, 16) && m.batch_stride % 4 == 0; }

inline Status row_shape_problem(int64_t batch, int64_t tokens, int32_t dim) {
  if (dim < 1 || dim > 1 << 24) return "dim must be in [1, 2^24]";
  if (batch < 0 || batch > kMaxGridYZ) return "batch must be in [0, 65535]";
  if (tokens < 0 || tokens > kMaxGridX) return "tokens must be in [0, 2^31)";
  return nullptr;
}

// Elements of a vector where all of a launch's operands are aligned and the row is made of whole vectors; else 1.
inline int row_width(bool all_aligned, int32_t dim, Dtype dtype, Dtype residual_dtype) {
  const int width =
      16 / (element_size(dtype) > element_size(residual_dtype) ? element_size(dtype) : element_size(residual_dtype));
  return all_aligned && dim % width == 0 ? width : 1;
}

}  // namespace lingbot::cuda
