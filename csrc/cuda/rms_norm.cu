// y = T(T(x * rsqrt(mean(x^2) + eps)) * weight) over the whole row.
#include "row_norm.cuh"

namespace lingbot::cuda {

struct RmsNormKernelParams {
  const void* x;
  int64_t x_batch, x_token;
  const void* weight;
  void* y;
  uint32_t tokens, dim;
  float inv_dim, eps;
};

template <typename T, int V, int kVecs, int kThreads, int kMinBlocks, LoadHint kLoad, StoreHint kStore>
__global__ void __launch_bounds__(kThreads == 0 ? max_row_threads(kVecs) : kThreads, kMinBlocks)
    rms_norm_rows(const __grid_constant__ RmsNormKernelParams p) {
  using Shape = RowShape<V, kVecs, kThreads>;
  __shared__ float shared[1][kMaxWarps];
  wait_for_previous_grid();
  allow_next_grid();
  const uint32_t token = blockIdx.x, batch = blockIdx.y;
  const T* in = static_cast<const T*>(p.x) + batch * p.x_batch + token * p.x_token;
  T* out = static_cast<T*>(p.y) + (static_cast<int64_t>(batch) * p.tokens + token) * p.dim;

  Vec<T, V> x[kVecs];
  load_row<kLoad, Shape>(in, true, p.dim, x);
  float sum[1] = {0.f};
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    float f[V], part = 0.f;
    unpack(x[i], f);
#pragma unroll
    for (int j = 0; j < V; ++j) part = fmaf(f[j], f[j], part);
    sum[0] += part;
  }
  row_sum(sum, shared);
  const float inv_rms = rsqrtf(sum[0] * p.inv_dim + p.eps);
  for_each_vector<Shape>(p.dim, [&](int i, int e) {
    float f[V], w[V];
    unpack(x[i], f);
    unpack(load_cached<V>(static_cast<const T*>(p.weight) + e), w);
#pragma unroll
    for (int j = 0; j < V; ++j) f[j] *= inv_rms;
    round_all<T>(f);
#pragma unroll
    for (int j = 0; j < V; ++j) f[j] *= w[j];
    store_vec<kStore>(out + e, pack<T, V>(f));
  });
}

template <typename T>
__global__ void __launch_bounds__(256) rms_norm_any(const __grid_constant__ RmsNormKernelParams p) {
  __shared__ float shared[1][kMaxWarps];
  wait_for_previous_grid();
  allow_next_grid();
  const uint32_t token = blockIdx.x, batch = blockIdx.y;
  const T* in = static_cast<const T*>(p.x) + batch * p.x_batch + token * p.x_token;
  T* out = static_cast<T*>(p.y) + (static_cast<int64_t>(batch) * p.tokens + token) * p.dim;
  float sum[1] = {0.f};
  for (uint32_t e = threadIdx.x; e < p.dim; e += blockDim.x) sum[0] = fmaf(to_float(in[e]), to_float(in[e]), sum[0]);
  row_sum(sum, shared);
  const float inv_rms = rsqrtf(sum[0] * p.inv_dim + p.eps);
  for (uint32_t e = threadIdx.x; e < p.dim; e += blockDim.x) {
    out[e] = from_float<T>(round_to<T>(to_float(in[e]) * inv_rms) * to_float(static_cast<const T*>(p.weight)[e]));
  }
}

inline RmsNormKernelParams kernel_params(const RmsNormParams& a) {
  return {a.x.ptr,
          a.x.batch_stride,
          a.x.token_stride,
          a.weight,
          a.y,
          static_cast<uint32_t>(a.tokens),
          static_cast<uint32_t>(a.dim),
          1.f / static_cast<float>(a.dim),
          a.eps};
}

Status rms_norm(const RmsNormParams& a, void* stream) {
  if (Status s = row_shape_problem(a.batch, a.tokens, a.dim)) return s;
  if (a.batch == 0 || a.tokens == 0) return nullptr;
  DeviceInfo device = {};
  if (Status s = device_info(&device)) return s;
  const bool vectors = rows_aligned(a.x.ptr, a.x.batch_stride, a.x.token_stride, element_size(a.dtype), 16) &&
                       aligned(a.weight, 16) && aligned(a.y, 16);
  const RowConfig config =
      rms_norm_config(a.dim, row_width(vectors, a.dim, a.dtype, a.dtype), a.batch * a.tokens, device.multiprocessors);
  const RmsNormKernelParams p = kernel_params(a);
  const dim3 grid(p.tokens, static_cast<uint32_t>(a.batch)), block(config.threads);
  return with_type(a.dtype, [&](auto tag) -> Status {
    using T = typename decltype(tag)::type;
    if (config.vectors == 5) {
      return launch(rms_norm_rows<T, kVectorElements<T, T>, 5, 128, 1, LoadHint::kNoAllocate, StoreHint::kWriteBack>,
                    grid, block, 0, stream, device.capability >= 90, p);
    }
    return with_row_shape<T, T>(config, [&](auto shape) -> Status {
      using S = decltype(shape);
      const bool overlap = device.capability >= 90;
      if constexpr (S::V == 1) {
        return launch(rms_norm_any<T>, grid, block, 0, stream, overlap, p);
      } else {
        return launch(rms_norm_rows<T, S::V, S::kVecs, S::kThreads, 1, LoadHint::kNoAllocate, StoreHint::kWriteBack>,
                      grid, block, 0, stream, overlap, p);
      }
    });
  });
}

}  // namespace lingbot::cuda
