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

// A block is Plan::kRows rows; gate and affine weights are read through L1. kCamera: cam_scale and cam_shift are there.
template <typename T, typename R, typename Shape, typename Plan, bool kCamera>
__global__ void __launch_bounds__(Shape::kThreads == 0 ? max_row_threads(Shape::kVecs) : Shape::kThreads,
                                  Plan::kMinBlocks) camera_norm_rows(const __grid_constant__ CameraNormKernelParams p) {
  constexpr int V = Shape::V, kVecs = Shape::kVecs, kRows = Plan::kRows;
  __shared__ float shared[2][kRows][kMaxWarps];
  wait_for_previous_grid();
  allow_next_grid();
  const BlockRows<Shape, Plan> rows(p.tokens, p.dim);
  Vec<R, V> x[kRows][kVecs];
  Vec<T, V> delta[kRows][kVecs], cam_scale[kRows][kVecs], cam_shift[kRows][kVecs];
  rows.load(p.x, x);
  rows.load(p.delta, delta);
  if constexpr (kCamera) {
    rows.load(p.cam_scale, cam_scale);
    rows.load(p.cam_shift, cam_shift);
  }
  auto gate = gate_channels<Shape, Plan>(p.gate, rows.batch, p.dim);
  auto affine = affine_channels<T, Shape, Plan>(p.weight, p.bias, p.dim);
  gate.ahead();
  for_each_vector<Shape>(p.dim, [&](int i, int e) {
    const GateVec<V> g = gate.at(i, e);
    rows.for_each_row([&](int n) {
      float f[V];
      add_gated(x[n][i], delta[n][i], g, f);
      if constexpr (kCamera) {
        float s[V], b[V];
        unpack(cam_scale[n][i], s);
        unpack(cam_shift[n][i], b);
#pragma unroll
        for (int j = 0; j < V; ++j) f[j] = fmaf(1.f + s[j], f[j], b[j]);
      }
      x[n][i] = rows.template store<R>(p.x_out, n, e, f);
    });
  });
  affine.ahead();
  RowMoments m[kRows];
  row_moments<Plan::kStatistics, Shape::kThreads>(x, p.dim, p.inv_dim, p.eps, shared, m);
  store_normalised<T>(rows, x, m, affine, p.y);
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
  const RowConfig config = residual_row_config(a.dim, row_width(vectors, a.dim, a.dtype, a.residual_dtype));
  const CameraNormKernelParams p = kernel_params(a);
  const dim3 grid(p.tokens, static_cast<uint32_t>(a.batch)), block(config.threads);
  return with_types(a.dtype, a.residual_dtype, [&](auto t, auto r) -> Status {
    using T = typename decltype(t)::type;
    using R = typename decltype(r)::type;
    return with_row_shape<T, R>(config, [&](auto shape) -> Status {
      using Shape = decltype(shape);
      const bool overlap = device.capability >= 90;
      if constexpr (Shape::V == 1) {
        return launch(camera_norm_any<T, R>, grid, block, 0, stream, overlap, p);
      } else {
        using Plan = RowPlan<1, 1, ChannelLoad::kLate, Statistics::kTwoPass, LoadHint::kNoAllocate, StoreHint::kStream>;
        if (p.cam_scale) return launch(camera_norm_rows<T, R, Shape, Plan, true>, grid, block, 0, stream, overlap, p);
        return launch(camera_norm_rows<T, R, Shape, Plan, false>, grid, block, 0, stream, overlap, p);
      }
    });
  });
}

}  // namespace lingbot::cuda
