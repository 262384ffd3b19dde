// layer_norm(x) * (1 + scale) + shift, rounded or quantised: no affine parameters, statistics in float32.
#pragma once

#include "quantize.cuh"

namespace lingbot::cuda {

// Y: void* for y rounded to T, or Codes.
template <typename Y>
struct LayerNormKernelParams {
  const void* x;  // [batch, tokens, dim], R
  Modulation shift, scale;
  Y y;
  uint32_t tokens, dim;
  float inv_dim, eps;
};

// A block is Plan::kRows rows; the modulation is read through L1.
template <typename T, typename R, typename Shape, typename Plan, typename Y = void*>
__global__ void __launch_bounds__(Shape::kThreads == 0 ? max_row_threads(Shape::kVecs) : Shape::kThreads,
                                  Plan::kMinBlocks)
    layer_norm_rows(const __grid_constant__ LayerNormKernelParams<Y> p) {
  constexpr int V = Shape::V, kRows = Plan::kRows;
  __shared__ float shared[2][kRows][kMaxWarps];
  wait_for_previous_grid();
  allow_next_grid();
  const BlockRows<Shape, Plan> rows(p.tokens, p.dim);
  Vec<R, V> x[kRows][Shape::kVecs];
  rows.load(p.x, x);
  auto modulation = modulation_channels<Shape, Plan>(p.scale, p.shift, rows.batch, p.dim);
  modulation.ahead();
  RowMoments m[kRows];
  row_moments<Plan::kStatistics, Shape>(x, p.dim, p.inv_dim, p.eps, shared, m);
  store_normalised<T>(rows, x, m, modulation, p.y);
}

template <typename T, typename R, typename Y = void*>
__global__ void __launch_bounds__(256) layer_norm_any(const __grid_constant__ LayerNormKernelParams<Y> p) {
  __shared__ float shared[2][1][kMaxWarps];
  wait_for_previous_grid();
  allow_next_grid();
  const uint32_t batch = blockIdx.y;
  const int64_t row = static_cast<int64_t>(batch) * p.tokens + blockIdx.x;
  const R* in = static_cast<const R*>(p.x) + row * p.dim;
  const float* scale = batch_channels(p.scale, batch);
  const float* shift = batch_channels(p.shift, batch);
  const RowMoments m = row_moments_any(in, p.dim, p.inv_dim, p.eps, shared);
  store_row_any<T>(p.y, row, p.dim, [&](uint32_t e) {
    return fmaf((to_float(in[e]) - m.mean) * m.inv_std, 1.f + modulation_at(scale, e, 0.f),
                modulation_at(shift, e, 0.f));
  });
}

template <typename Params, typename Y>
LayerNormKernelParams<Y> layer_norm_params(const Params& a, const Y& y) {
  return {a.x,
          a.shift,
          a.scale,
          y,
          static_cast<uint32_t>(a.tokens),
          static_cast<uint32_t>(a.dim),
          1.f / static_cast<float>(a.dim),
          a.eps};
}

}  // namespace lingbot::cuda
