// x1 = x + delta * gate; x_out = (1 + cam_scale) * x1 + cam_shift, rounded to the residual type once;
// y = layer_norm(x_out) * weight + bias of the rounded x_out.
#include "row_norm.cuh"

namespace lingbot::cuda {

struct CameraNormKernelParams {
  const void* x;      // [batch, tokens, dim], R
  const void* delta;  // T
  Modulation gate;
  const void* cam_scale;  // [batch, tokens, dim], T; null: no camera
  const void* cam_shift;
  const void* weight;  // [dim], T
  const void* bias;
  void* x_out;  // R
  void* y;      // T
  uint32_t tokens, dim;
  float inv_dim, eps;
};

// kPersistent: blocks step through the rows of their batch gridDim.x apart, with the next row's loads in flight and the
// affine weights in registers; else a block is one row.
template <typename T, typename R, int V, int kVecs, int kThreads, int kMinBlocks, bool kPersistent, LoadHint kLoad,
          StoreHint kStore>
__global__ void __launch_bounds__(kThreads == 0 ? max_row_threads(kVecs) : kThreads, kMinBlocks)
    camera_norm_rows(const __grid_constant__ CameraNormKernelParams p) {
  __shared__ float shared[2][1][kMaxWarps];
  wait_for_previous_grid();
  allow_next_grid();
  const uint32_t batch = blockIdx.y;
  const int64_t start = static_cast<int64_t>(batch) * p.tokens * p.dim;
  const float* gate = batch_channels(p.gate, batch);
  const bool camera = p.cam_scale != nullptr;

  const auto load_row = [&](uint32_t token, Vec<R, V>(&x)[kVecs], Vec<T, V>(&delta)[kVecs],
                            Vec<T, V>(&cam_scale)[kVecs], Vec<T, V>(&cam_shift)[kVecs]) {
    const int64_t row = start + static_cast<int64_t>(token) * p.dim;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int e = row_element<V, kThreads>(i);
      const bool inside = in_row<kThreads>(e, p.dim);
      x[i] = inside ? load_stream<kLoad, V>(static_cast<const R*>(p.x) + row + e) : zero_vec<R, V>();
      delta[i] = inside ? load_stream<kLoad, V>(static_cast<const T*>(p.delta) + row + e) : zero_vec<T, V>();
      if (camera && inside) {
        cam_scale[i] = load_stream<kLoad, V>(static_cast<const T*>(p.cam_scale) + row + e);
        cam_shift[i] = load_stream<kLoad, V>(static_cast<const T*>(p.cam_shift) + row + e);
      } else {
        cam_scale[i] = zero_vec<T, V>();
        cam_shift[i] = zero_vec<T, V>();
      }
    }
  };

  Vec<R, V> x[kVecs];
  Vec<T, V> delta[kVecs], cam_scale[kVecs], cam_shift[kVecs];
  load_row(blockIdx.x, x, delta, cam_scale, cam_shift);
  constexpr int kHeld = kPersistent ? kVecs : 1;
  Vec<T, V> weight[kHeld], bias[kHeld];
  if constexpr (kPersistent) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int e = row_element<V, kThreads>(i);
      if (!in_row<kThreads>(e, p.dim)) continue;
      weight[i] = load_cached<V>(static_cast<const T*>(p.weight) + e);
      bias[i] = load_cached<V>(static_cast<const T*>(p.bias) + e);
    }
  }
  for (uint64_t token = blockIdx.x;;) {
    const int64_t row = start + static_cast<int64_t>(token) * p.dim;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int e = row_element<V, kThreads>(i);
      if (!in_row<kThreads>(e, p.dim)) continue;
      float f[V], d[V], g[V], s[V], b[V];
      load_modulation<V>(gate, e, 1.f, g);
      unpack(x[i], f);
      unpack(delta[i], d);
      unpack(cam_scale[i], s);
      unpack(cam_shift[i], b);
#pragma unroll
      for (int j = 0; j < V; ++j)
        f[j] = fmaf(1.f + s[j], fmaf(d[j], g[j], f[j]), b[j]);  // without a camera: times 1, plus 0
      x[i] = pack<R, V>(f);
      store_vec<kStore>(static_cast<R*>(p.x_out) + row + e, x[i]);
    }
    const uint64_t next = token + gridDim.x;
    Vec<R, V> ahead[kVecs];
    if constexpr (kPersistent) {
      if (next < p.tokens) load_row(static_cast<uint32_t>(next), ahead, delta, cam_scale, cam_shift);
    }
    const RowMoments m = row_moments<kThreads>(x, p.dim, p.inv_dim, p.eps, shared);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int e = row_element<V, kThreads>(i);
      if (!in_row<kThreads>(e, p.dim)) continue;
      if constexpr (!kPersistent) {
        weight[0] = load_cached<V>(static_cast<const T*>(p.weight) + e);
        bias[0] = load_cached<V>(static_cast<const T*>(p.bias) + e);
      }
      float f[V], w[V], b[V];
      unpack(x[i], f);
      unpack(weight[kPersistent ? i : 0], w);
      unpack(bias[kPersistent ? i : 0], b);
#pragma unroll
      for (int j = 0; j < V; ++j) f[j] = fmaf((f[j] - m.mean) * m.inv_std, w[j], b[j]);
      store_vec<kStore>(static_cast<T*>(p.y) + row + e, pack<T, V>(f));
    }
    if (!kPersistent || next >= p.tokens) return;
    token = next;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) x[i] = ahead[i];
  }
}

template <typename T, typename R>
__global__ void __launch_bounds__(256) camera_norm_any(const __grid_constant__ CameraNormKernelParams p) {
  __shared__ float shared[2][1][kMaxWarps];
  wait_for_previous_grid();
  allow_next_grid();
  const uint32_t batch = blockIdx.y;
  const int64_t row = (static_cast<int64_t>(batch) * p.tokens + blockIdx.x) * p.dim;
  const R* x = static_cast<const R*>(p.x) + row;
  const T* delta = static_cast<const T*>(p.delta) + row;
  const T* cam_scale = static_cast<const T*>(p.cam_scale) + (p.cam_scale ? row : 0);
  const T* cam_shift = static_cast<const T*>(p.cam_shift) + (p.cam_scale ? row : 0);
  R* x_out = static_cast<R*>(p.x_out) + row;
  T* y = static_cast<T*>(p.y) + row;
  const float* gate = batch_channels(p.gate, batch);
  for (uint32_t e = threadIdx.x; e < p.dim; e += blockDim.x) {
    float value = fmaf(to_float(delta[e]), modulation_at(gate, e, 1.f), to_float(x[e]));
    if (p.cam_scale) value = fmaf(1.f + to_float(cam_scale[e]), value, to_float(cam_shift[e]));
    x_out[e] = from_float<R>(value);
  }
  const RowMoments m = row_moments_any(x_out, p.dim, p.inv_dim, p.eps, shared);  // a thread reads what it wrote itself
  for (uint32_t e = threadIdx.x; e < p.dim; e += blockDim.x) {
    const float normalised = (to_float(x_out[e]) - m.mean) * m.inv_std;
    y[e] = from_float<T>(
        fmaf(normalised, to_float(static_cast<const T*>(p.weight)[e]), to_float(static_cast<const T*>(p.bias)[e])));
  }
}

inline CameraNormKernelParams kernel_params(const GatedResidualCameraNormParams& a) {
  return {a.x,
          a.delta,
          a.gate,
          a.cam_scale,
          a.cam_shift,
          a.weight,
          a.bias,
          a.x_out,
          a.y,
          static_cast<uint32_t>(a.tokens),
          static_cast<uint32_t>(a.dim),
          1.f / static_cast<float>(a.dim),
          a.eps};
}

Status gated_residual_camera_norm(const GatedResidualCameraNormParams& a, void* stream) {
  if (Status s = row_shape_problem(a.batch, a.tokens, a.dim)) return s;
  if ((a.cam_scale == nullptr) != (a.cam_shift == nullptr)) return "cam_scale and cam_shift must be given together";
  if (a.batch == 0 || a.tokens == 0) return nullptr;
  DeviceInfo device = {};
  if (Status s = device_info(&device)) return s;
  const bool vectors = aligned(a.x, 16) && aligned(a.delta, 16) && aligned(a.cam_scale, 16) &&
                       aligned(a.cam_shift, 16) && aligned(a.weight, 16) && aligned(a.bias, 16) &&
                       aligned(a.x_out, 16) && aligned(a.y, 16) && modulation_aligned(a.gate);
  const RowConfig config = row_config(a.dim, row_width(vectors, a.dim, a.dtype, a.residual_dtype), 1);
  const CameraNormKernelParams p = kernel_params(a);
  const dim3 grid(p.tokens, static_cast<uint32_t>(a.batch)), block(config.threads);
  return with_types(a.dtype, a.residual_dtype, [&](auto t, auto r) -> Status {
    using T = typename decltype(t)::type;
    using R = typename decltype(r)::type;
    return with_row_shape<T, R>(config, [&](auto shape) -> Status {
      using S = decltype(shape);
      const bool overlap = device.capability >= 90;
      if constexpr (S::V == 1) {
        return launch(camera_norm_any<T, R>, grid, block, 0, stream, overlap, p);
      } else {
        return launch(
            camera_norm_rows<T, R, S::V, S::kVecs, S::kThreads, 1, false, LoadHint::kNoAllocate, StoreHint::kWriteBack>,
            grid, block, 0, stream, overlap, p);
      }
    });
  });
}

}  // namespace lingbot::cuda
