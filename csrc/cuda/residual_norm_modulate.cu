// x_out = x + delta * gate, rounded to the residual type; y = layer_norm(x_out) * (1 + scale) + shift of the rounded
// x_out.
#include "row_norm.cuh"

namespace lingbot::cuda {

struct ResidualNormKernelParams {
  const void* x;      // [batch, tokens, dim], R
  const void* delta;  // T
  Modulation gate, shift, scale;
  void* x_out;  // R
  void* y;      // T
  uint32_t tokens, dim;
  float inv_dim, eps;
};

// kPersistent: blocks step through the rows of their batch gridDim.x apart, with the modulation in registers and the
// next row's loads in flight; else a block is one row, and modulation is read through L1.
template <typename T, typename R, int V, int kVecs, int kThreads, int kMinBlocks, bool kPersistent, LoadHint kLoad,
          StoreHint kStore>
__global__ void __launch_bounds__(kThreads == 0 ? max_row_threads(kVecs) : kThreads, kMinBlocks)
    residual_norm_rows(const __grid_constant__ ResidualNormKernelParams p) {
  __shared__ float shared[2][1][kMaxWarps];
  wait_for_previous_grid();
  allow_next_grid();
  const uint32_t batch = blockIdx.y;
  const int64_t start = static_cast<int64_t>(batch) * p.tokens * p.dim;
  const float* gate = batch_channels(p.gate, batch);
  const float* scale = batch_channels(p.scale, batch);
  const float* shift = batch_channels(p.shift, batch);

  const auto load_row = [&](uint32_t token, Vec<R, V>(&x)[kVecs], Vec<T, V>(&delta)[kVecs]) {
    const int64_t row = start + static_cast<int64_t>(token) * p.dim;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int e = row_element<V, kThreads>(i);
      const bool inside = in_row<kThreads>(e, p.dim);
      x[i] = inside ? load_stream<kLoad, V>(static_cast<const R*>(p.x) + row + e) : zero_vec<R, V>();
      delta[i] = inside ? load_stream<kLoad, V>(static_cast<const T*>(p.delta) + row + e) : zero_vec<T, V>();
    }
  };

  Vec<R, V> x[kVecs];
  Vec<T, V> delta[kVecs];
  load_row(blockIdx.x, x, delta);
  constexpr int kHeld = kPersistent ? kVecs : 1;
  float weight[kHeld][V], gain[kHeld][V], bias[kHeld][V];
  if constexpr (kPersistent) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int e = row_element<V, kThreads>(i);
      if (!in_row<kThreads>(e, p.dim)) continue;
      load_modulation<V>(gate, e, 1.f, weight[i]);
      load_modulation<V>(scale, e, 0.f, gain[i]);
      load_modulation<V>(shift, e, 0.f, bias[i]);
    }
  }
  for (uint64_t token = blockIdx.x;;) {
    const int64_t row = start + static_cast<int64_t>(token) * p.dim;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int e = row_element<V, kThreads>(i);
      if (!in_row<kThreads>(e, p.dim)) continue;
      if constexpr (!kPersistent) load_modulation<V>(gate, e, 1.f, weight[0]);
      float f[V], d[V];
      unpack(x[i], f);
      unpack(delta[i], d);
#pragma unroll
      for (int j = 0; j < V; ++j) f[j] = fmaf(d[j], weight[kPersistent ? i : 0][j], f[j]);
      x[i] = pack<R, V>(f);
      store_vec<kStore>(static_cast<R*>(p.x_out) + row + e, x[i]);
    }
    const uint64_t next = token + gridDim.x;
    Vec<R, V> ahead[kVecs];
    if constexpr (kPersistent) {
      if (next < p.tokens) load_row(static_cast<uint32_t>(next), ahead, delta);
    }
    const RowMoments m = row_moments<kThreads>(x, p.dim, p.inv_dim, p.eps, shared);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int e = row_element<V, kThreads>(i);
      if (!in_row<kThreads>(e, p.dim)) continue;
      if constexpr (!kPersistent) {
        load_modulation<V>(scale, e, 0.f, gain[0]);
        load_modulation<V>(shift, e, 0.f, bias[0]);
      }
      float f[V];
      unpack(x[i], f);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        f[j] = fmaf((f[j] - m.mean) * m.inv_std, 1.f + gain[kPersistent ? i : 0][j], bias[kPersistent ? i : 0][j]);
      }
      store_vec<kStore>(static_cast<T*>(p.y) + row + e, pack<T, V>(f));
    }
    if (!kPersistent || next >= p.tokens) return;
    token = next;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) x[i] = ahead[i];
  }
}

template <typename T, typename R>
__global__ void __launch_bounds__(256) residual_norm_any(const __grid_constant__ ResidualNormKernelParams p) {
  __shared__ float shared[2][1][kMaxWarps];
  wait_for_previous_grid();
  allow_next_grid();
  const uint32_t batch = blockIdx.y;
  const int64_t row = (static_cast<int64_t>(batch) * p.tokens + blockIdx.x) * p.dim;
  const R* x = static_cast<const R*>(p.x) + row;
  const T* delta = static_cast<const T*>(p.delta) + row;
  R* x_out = static_cast<R*>(p.x_out) + row;
  T* y = static_cast<T*>(p.y) + row;
  const float* gate = batch_channels(p.gate, batch);
  const float* scale = batch_channels(p.scale, batch);
  const float* shift = batch_channels(p.shift, batch);
  for (uint32_t e = threadIdx.x; e < p.dim; e += blockDim.x) {
    x_out[e] = from_float<R>(fmaf(to_float(delta[e]), modulation_at(gate, e, 1.f), to_float(x[e])));
  }
  const RowMoments m = row_moments_any(x_out, p.dim, p.inv_dim, p.eps, shared);  // a thread reads what it wrote itself
  for (uint32_t e = threadIdx.x; e < p.dim; e += blockDim.x) {
    const float normalised = (to_float(x_out[e]) - m.mean) * m.inv_std;
    y[e] = from_float<T>(fmaf(normalised, 1.f + modulation_at(scale, e, 0.f), modulation_at(shift, e, 0.f)));
  }
}

inline ResidualNormKernelParams kernel_params(const ResidualNormModulateParams& a) {
  return {a.x,
          a.delta,
          a.gate,
          a.shift,
          a.scale,
          a.x_out,
          a.y,
          static_cast<uint32_t>(a.tokens),
          static_cast<uint32_t>(a.dim),
          1.f / static_cast<float>(a.dim),
          a.eps};
}

Status residual_norm_modulate(const ResidualNormModulateParams& a, void* stream) {
  if (Status s = row_shape_problem(a.batch, a.tokens, a.dim)) return s;
  if (a.batch == 0 || a.tokens == 0) return nullptr;
  DeviceInfo device = {};
  if (Status s = device_info(&device)) return s;
  const bool vectors = aligned(a.x, 16) && aligned(a.delta, 16) && aligned(a.x_out, 16) && aligned(a.y, 16) &&
                       modulation_aligned(a.gate) && modulation_aligned(a.shift) && modulation_aligned(a.scale);
  const RowConfig config = row_config(a.dim, row_width(vectors, a.dim, a.dtype, a.residual_dtype), 1);
  const ResidualNormKernelParams p = kernel_params(a);
  const dim3 grid(p.tokens, static_cast<uint32_t>(a.batch)), block(config.threads);
  return with_types(a.dtype, a.residual_dtype, [&](auto t, auto r) -> Status {
    using T = typename decltype(t)::type;
    using R = typename decltype(r)::type;
    return with_row_shape<T, R>(config, [&](auto shape) -> Status {
      using S = decltype(shape);
      const bool overlap = device.capability >= 90;
      if constexpr (S::V == 1) {
        return launch(residual_norm_any<T, R>, grid, block, 0, stream, overlap, p);
      } else {
        return launch(residual_norm_rows<T, R, S::V, S::kVecs, S::kThreads, 1, false, LoadHint::kNoAllocate,
                                         StoreHint::kWriteBack>,
                      grid, block, 0, stream, overlap, p);
      }
    });
  });
}

}  // namespace lingbot::cuda
