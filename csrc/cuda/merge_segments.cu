// out = sum over segments of softmax(lse) * segment: attention over disjoint sets of keys into attention over all.
#include "block.cuh"
#include "launch.cuh"
#include "vec.cuh"

namespace lingbot::cuda {

struct MergeKernelParams {
  const void* segments;
  int64_t segment_stride, batch_stride, token_stride;
  const float* lse;
  int64_t lse_segment, lse_batch, lse_head;
  void* out;
  uint32_t tokens, count, dim, head_dim;
};

constexpr int kMaxSegments = 64;
constexpr int kMergeTokens = 2;  // of a thread, in flight together

// weight[n] = softmax over n of lse[n], of one head's token.
template <int kCount>
__device__ __forceinline__ void segment_weights(const MergeKernelParams& p, const float* lse, float (&weight)[kCount]) {
  float largest = -INFINITY, sum = 0.f;
#pragma unroll
  for (int n = 0; n < kCount; ++n) weight[n] = lse[n * p.lse_segment], largest = fmaxf(largest, weight[n]);
#pragma unroll
  for (int n = 0; n < kCount; ++n) sum += weight[n] = __expf(weight[n] - largest);
  const float scale = 1.f / sum;
#pragma unroll
  for (int n = 0; n < kCount; ++n) weight[n] *= scale;
}

// blockDim.x threads along a token's vectors, blockDim.y * kMergeTokens tokens per block.
template <typename T, int V, int kCount>
__global__ void __launch_bounds__(512) merge_rows(const __grid_constant__ MergeKernelParams p) {
  wait_for_previous_grid();
  allow_next_grid();
  const uint32_t batch = blockIdx.y;
  const uint64_t first = (static_cast<uint64_t>(blockIdx.x) * blockDim.y + threadIdx.y) * kMergeTokens;
  const T* in = static_cast<const T*>(p.segments) + batch * p.batch_stride;
  T* out = static_cast<T*>(p.out) + static_cast<int64_t>(batch) * p.tokens * p.dim;
  for (uint32_t e = threadIdx.x * V; e < p.dim; e += blockDim.x * V) {
    const float* lse = p.lse + batch * p.lse_batch + e / p.head_dim * p.lse_head;
    Vec<T, V> x[kMergeTokens][kCount];
#pragma unroll
    for (int t = 0; t < kMergeTokens; ++t) {
      if (first + t >= p.tokens) break;
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        const T* at = in + n * p.segment_stride + static_cast<int64_t>(first + t) * p.token_stride + e;
        x[t][n] = load_stream<LoadHint::kNoAllocate, V>(at);
      }
    }
#pragma unroll
    for (int t = 0; t < kMergeTokens; ++t) {
      if (first + t >= p.tokens) break;
      float weight[kCount], merged[V];
      segment_weights(p, lse + first + t, weight);
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        float f[V];
        unpack(x[t][n], f);
#pragma unroll
        for (int j = 0; j < V; ++j) merged[j] = n == 0 ? f[j] * weight[0] : fmaf(f[j], weight[n], merged[j]);
      }
      store_vec<StoreHint::kWriteBack>(out + static_cast<int64_t>(first + t) * p.dim + e, pack<T, V>(merged));
    }
  }
}

// Any number of segments, any alignment: element by element.
template <typename T>
__global__ void __launch_bounds__(256) merge_any(const __grid_constant__ MergeKernelParams p) {
  wait_for_previous_grid();
  allow_next_grid();
  const uint32_t token = blockIdx.x, batch = blockIdx.y;
  const T* in = static_cast<const T*>(p.segments) + batch * p.batch_stride + token * p.token_stride;
  T* out = static_cast<T*>(p.out) + (static_cast<int64_t>(batch) * p.tokens + token) * p.dim;
  for (uint32_t e = threadIdx.x; e < p.dim; e += blockDim.x) {
    const float* lse = p.lse + batch * p.lse_batch + e / p.head_dim * p.lse_head + token;
    float largest = -INFINITY, sum = 0.f, merged = 0.f;
    for (uint32_t n = 0; n < p.count; ++n) largest = fmaxf(largest, lse[n * p.lse_segment]);
    for (uint32_t n = 0; n < p.count; ++n) {
      const float weight = __expf(lse[n * p.lse_segment] - largest);
      sum += weight;
      merged = fmaf(to_float(in[n * p.segment_stride + e]), weight, merged);
    }
    out[e] = from_float<T>(merged / sum);
  }
}

Status merge_segments(const MergeSegmentsParams& a, void* stream) {
  if (a.count < 1 || a.count > kMaxSegments) return "count must be from 1 to 64";
  if (a.heads < 1 || a.head_dim < 1) return "heads and head_dim must be positive";
  if (a.batch < 0 || a.batch > kMaxGridYZ) return "batch must be in [0, 65535]";
  if (a.tokens < 0 || a.tokens > kMaxGridX) return "tokens must be in [0, 2^31)";
  const int64_t dim = static_cast<int64_t>(a.heads) * a.head_dim;
  if (dim > 1 << 24) return "heads * head_dim must be at most 2^24";
  if (a.batch == 0 || a.tokens == 0) return nullptr;
  DeviceInfo device = {};
  if (Status s = device_info(&device)) return s;
  const int size = element_size(a.dtype), width = 16 / size;
  const bool vectors = a.head_dim % width == 0 && aligned(a.out, 16) && a.segment_stride % width == 0 &&
                       rows_aligned(a.segments, a.batch_stride, a.token_stride, size, 16);
  const MergeKernelParams p = {a.segments,
                               a.segment_stride,
                               a.batch_stride,
                               a.token_stride,
                               a.lse,
                               a.lse_segment_stride,
                               a.lse_batch_stride,
                               a.lse_head_stride,
                               a.out,
                               static_cast<uint32_t>(a.tokens),
                               static_cast<uint32_t>(a.count),
                               static_cast<uint32_t>(dim),
                               static_cast<uint32_t>(a.head_dim)};
  const bool overlap = device.capability >= 90;
  const UnpackConfig config = unpack_config(static_cast<int>(dim / width));
  const dim3 block(config.threads, config.rows), grid_any(p.tokens, static_cast<uint32_t>(a.batch));
  const dim3 grid(static_cast<uint32_t>(ceil_div(a.tokens, config.rows * kMergeTokens)), grid_any.y);
  return with_type(a.dtype, [&](auto tag) -> Status {
    using T = typename decltype(tag)::type;
    constexpr int V = kVectorElements<T, T>;
    if (vectors && a.count == 2) return launch(merge_rows<T, V, 2>, grid, block, 0, stream, overlap, p);
    if (vectors && a.count == 3) return launch(merge_rows<T, V, 3>, grid, block, 0, stream, overlap, p);
    if (vectors && a.count == 4) return launch(merge_rows<T, V, 4>, grid, block, 0, stream, overlap, p);
    return launch(merge_any<T>, grid_any, dim3(256), 0, stream, overlap, p);
  });
}

}  // namespace lingbot::cuda
