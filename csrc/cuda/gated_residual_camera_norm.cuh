// x_out = (1 + cam_scale) * (x + delta * gate) + cam_shift, rounded to the residual type once; layer_norm(x_out) *
// weight + bias of the rounded x_out, rounded or quantised.
#pragma once

#include "quantize.cuh"

namespace lingbot::cuda {

// Y: void* for y rounded to T, or Codes.
template <typename Y>
struct CameraNormKernelParams {
  const void* x;      // [batch, tokens, dim], R
  const void* delta;  // T
  Modulation gate;
  const void* cam_scale;  // [batch, tokens, dim], T; null: no camera
  const void* cam_shift;
  const void* weight;  // [dim], T
  const void* bias;
  void* x_out;  // R
  Y y;
  uint32_t tokens, dim;
  float inv_dim, eps;
};

// A block is Plan::kRows rows; gate and affine weights are read through L1. kCamera: cam_scale and cam_shift are there.
template <typename T, typename R, typename Shape, typename Plan, bool kCamera, typename Y = void*>
__global__ void __launch_bounds__(Shape::kThreads == 0 ? max_row_threads(Shape::kVecs) : Shape::kThreads,
                                  Plan::kMinBlocks)
    camera_norm_rows(const __grid_constant__ CameraNormKernelParams<Y> p) {
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
  row_moments<Plan::kStatistics, Shape>(x, p.dim, p.inv_dim, p.eps, shared, m);
  store_normalised<T>(rows, x, m, affine, p.y);
}

template <typename T, typename R, typename Y = void*>
__global__ void __launch_bounds__(256) camera_norm_any(const __grid_constant__ CameraNormKernelParams<Y> p) {
  __shared__ float shared[2][1][kMaxWarps];
  wait_for_previous_grid();
  allow_next_grid();
  const uint32_t batch = blockIdx.y;
  const int64_t row = static_cast<int64_t>(batch) * p.tokens + blockIdx.x, start = row * p.dim;
  const R* x = static_cast<const R*>(p.x) + start;
  const T* delta = static_cast<const T*>(p.delta) + start;
  const T* cam_scale = static_cast<const T*>(p.cam_scale) + (p.cam_scale ? start : 0);
  const T* cam_shift = static_cast<const T*>(p.cam_shift) + (p.cam_scale ? start : 0);
  R* x_out = static_cast<R*>(p.x_out) + start;
  const float* gate = batch_channels(p.gate, batch);
  for (uint32_t e = threadIdx.x; e < p.dim; e += blockDim.x) {
    float value = fmaf(to_float(delta[e]), modulation_at(gate, e, 1.f), to_float(x[e]));
    if (p.cam_scale) value = fmaf(1.f + to_float(cam_scale[e]), value, to_float(cam_shift[e]));
    x_out[e] = from_float<R>(value);
  }
  // What other threads wrote to x_out is read after the barriers of the statistics alone.
  const RowMoments m = row_moments_any(x_out, p.dim, p.inv_dim, p.eps, shared);
  store_row_any<T>(p.y, row, p.dim, [&](uint32_t e) {
    return fmaf((to_float(x_out[e]) - m.mean) * m.inv_std, to_float(static_cast<const T*>(p.weight)[e]),
                to_float(static_cast<const T*>(p.bias)[e]));
  });
}

template <typename Params, typename Y>
CameraNormKernelParams<Y> camera_norm_params(const Params& a, const Y& y) {
  return {a.x,
          a.delta,
          a.gate,
          a.cam_scale,
          a.cam_shift,
          a.weight,
          a.bias,
          a.x_out,
          y,
          static_cast<uint32_t>(a.tokens),
          static_cast<uint32_t>(a.dim),
          1.f / static_cast<float>(a.dim),
          a.eps};
}

inline bool camera_aligned(const void* cam_scale, const void* cam_shift, const void* weight, const void* bias) {
  return aligned(cam_scale, 16) && aligned(cam_shift, 16) && aligned(weight, 16) && aligned(bias, 16);
}

inline Status camera_problem(const void* cam_scale, const void* cam_shift) {
  return (cam_scale == nullptr) == (cam_shift == nullptr) ? nullptr : "cam_scale and cam_shift must be given together";
}

}  // namespace lingbot::cuda
