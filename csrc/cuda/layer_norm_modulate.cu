// y = layer_norm(x) * (1 + scale) + shift: no affine parameters, statistics in float32, one rounding.
#include "row_norm.cuh"

namespace lingbot::cuda {

struct LayerNormKernelParams {
  const void* x;  // [batch, tokens, dim], R
  Modulation shift, scale;
  void* y;  // T
  uint32_t tokens, dim;
  float inv_dim, eps;
};

// kPersistent: blocks step through the rows of their batch gridDim.x apart, with the modulation in registers and the
// next row's loads in flight; else a block is one row, and modulation is read through L1.
template <typename T, typename R, int V, int kVecs, int kThreads, int kMinBlocks, bool kPersistent, LoadHint kLoad,
          StoreHint kStore>
__global__ void __launch_bounds__(kThreads == 0 ? max_row_threads(kVecs) : kThreads, kMinBlocks)
    layer_norm_rows(const __grid_constant__ LayerNormKernelParams p) {
  __shared__ float shared[2][1][kMaxWarps];
  wait_for_previous_grid();
  allow_next_grid();
  const uint32_t batch = blockIdx.y;
  const int64_t start = static_cast<int64_t>(batch) * p.tokens * p.dim;
  const R* in = static_cast<const R*>(p.x) + start;
  T* out = static_cast<T*>(p.y) + start;
  const float* scale = batch_channels(p.scale, batch);
  const float* shift = batch_channels(p.shift, batch);

  const auto load_row = [&](uint32_t token, Vec<R, V>(&x)[kVecs]) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int e = row_element<V, kThreads>(i);
      x[i] = in_row<kThreads>(e, p.dim) ? load_stream<kLoad, V>(in + static_cast<int64_t>(token) * p.dim + e)
                                        : zero_vec<R, V>();
    }
  };

  Vec<R, V> x[kVecs];
  load_row(blockIdx.x, x);
  float gain[kPersistent ? kVecs : 1][V], bias[kPersistent ? kVecs : 1][V];
  if constexpr (kPersistent) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int e = row_element<V, kThreads>(i);
      if (!in_row<kThreads>(e, p.dim)) continue;
      load_modulation<V>(scale, e, 0.f, gain[i]);
      load_modulation<V>(shift, e, 0.f, bias[i]);
    }
  }
  for (uint64_t token = blockIdx.x;;) {
    const uint64_t next = token + gridDim.x;
    Vec<R, V> ahead[kVecs];
    if constexpr (kPersistent) {
      if (next < p.tokens) load_row(static_cast<uint32_t>(next), ahead);
    }
    const RowMoments m = row_moments<kThreads>(x, p.dim, p.inv_dim, p.eps, shared);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int e = row_element<V, kThreads>(i);
      if (!in_row<kThreads>(e, p.dim)) continue;
      constexpr bool kHeld = kPersistent;
      if constexpr (!kHeld) {
        load_modulation<V>(scale, e, 0.f, gain[0]);
        load_modulation<V>(shift, e, 0.f, bias[0]);
      }
      float f[V];
      unpack(x[i], f);
#pragma unroll
      for (int j = 0; j < V; ++j)
        f[j] = fmaf((f[j] - m.mean) * m.inv_std, 1.f + gain[kHeld ? i : 0][j], bias[kHeld ? i : 0][j]);
      store_vec<kStore>(out + static_cast<int64_t>(token) * p.dim + e, pack<T, V>(f));
    }
    if (!kPersistent || next >= p.tokens) return;
    token = next;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) x[i] = ahead[i];
  }
}

template <typename T, typename R>
__global__ void __launch_bounds__(256) layer_norm_any(const __grid_constant__ LayerNormKernelParams p) {
  __shared__ float shared[2][1][kMaxWarps];
  wait_for_previous_grid();
  allow_next_grid();
  const uint32_t batch = blockIdx.y;
  const int64_t start = (static_cast<int64_t>(batch) * p.tokens + blockIdx.x) * p.dim;
  const R* in = static_cast<const R*>(p.x) + start;
  T* out = static_cast<T*>(p.y) + start;
  const float* scale = batch_channels(p.scale, batch);
  const float* shift = batch_channels(p.shift, batch);
  const RowMoments m = row_moments_any(in, p.dim, p.inv_dim, p.eps, shared);
  for (uint32_t e = threadIdx.x; e < p.dim; e += blockDim.x) {
    out[e] = from_float<T>(
        fmaf((to_float(in[e]) - m.mean) * m.inv_std, 1.f + modulation_at(scale, e, 0.f), modulation_at(shift, e, 0.f)));
  }
}

inline LayerNormKernelParams kernel_params(const LayerNormModulateParams& a) {
  return {a.x,
          a.shift,
          a.scale,
          a.y,
          static_cast<uint32_t>(a.tokens),
          static_cast<uint32_t>(a.dim),
          1.f / static_cast<float>(a.dim),
          a.eps};
}

Status layer_norm_modulate(const LayerNormModulateParams& a, void* stream) {
  if (Status s = row_shape_problem(a.batch, a.tokens, a.dim)) return s;
  if (a.batch == 0 || a.tokens == 0) return nullptr;
  DeviceInfo device = {};
  if (Status s = device_info(&device)) return s;
  const bool vectors =
      aligned(a.x, 16) && aligned(a.y, 16) && modulation_aligned(a.shift) && modulation_aligned(a.scale);
  const RowConfig config = row_config(a.dim, row_width(vectors, a.dim, a.dtype, a.residual_dtype), 1);
  const LayerNormKernelParams p = kernel_params(a);
  const dim3 grid(p.tokens, static_cast<uint32_t>(a.batch)), block(config.threads);
  return with_types(a.dtype, a.residual_dtype, [&](auto t, auto r) -> Status {
    using T = typename decltype(t)::type;
    using R = typename decltype(r)::type;
    return with_row_shape<T, R>(config, [&](auto shape) -> Status {
      using S = decltype(shape);
      const bool overlap = device.capability >= 90;
      if constexpr (S::V == 1) {
        return launch(layer_norm_any<T, R>, grid, block, 0, stream, overlap, p);
      } else {
        return launch(
            layer_norm_rows<T, R, S::V, S::kVecs, S::kThreads, 1, false, LoadHint::kNoAllocate, StoreHint::kWriteBack>,
            grid, block, 0, stream, overlap, p);
      }
    });
  });
}

}  // namespace lingbot::cuda
