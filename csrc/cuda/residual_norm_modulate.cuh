// x_out = x + delta * gate, rounded to the residual type; layer_norm(x_out) * (1 + scale) + shift of the rounded x_out,
// rounded or quantised.
#pragma once

#include "quantize.cuh"

namespace lingbot::cuda {

// Y: void* for y rounded to T, or Codes.
template <typename Y>
struct ResidualNormKernelParams {
  const void* x;      // [batch, tokens, dim], R
  const void* delta;  // T
  Modulation gate, shift, scale;
  void* x_out;  // R
  Y y;
  uint32_t tokens, dim;
  float inv_dim, eps;
};

// A block is Plan::kRows rows; the modulation is read through L1.
template <typename T, typename R, typename Shape, typename Plan, typename Y = void*>
__global__ void __launch_bounds__(Shape::kThreads == 0 ? max_row_threads(Shape::kVecs) : Shape::kThreads,
                                  Plan::kMinBlocks)
    residual_norm_rows(const __grid_constant__ ResidualNormKernelParams<Y> p) {
  constexpr int V = Shape::V, kVecs = Shape::kVecs, kRows = Plan::kRows;
  __shared__ float shared[2][kRows][kMaxWarps];
  wait_for_previous_grid();
  allow_next_grid();
  const BlockRows<Shape, Plan> rows(p.tokens, p.dim);
  Vec<R, V> x[kRows][kVecs];
  Vec<T, V> delta[kRows][kVecs];
  rows.load(p.x, x);
  rows.load(p.delta, delta);
  auto gate = gate_channels<Shape, Plan>(p.gate, rows.batch, p.dim);
  auto modulation = modulation_channels<Shape, Plan>(p.scale, p.shift, rows.batch, p.dim);
  gate.ahead();
  for_each_vector<Shape>(p.dim, [&](int i, int e) {
    const GateVec<V> g = gate.at(i, e);
    rows.for_each_row([&](int n) {
      float f[V];
      add_gated(x[n][i], delta[n][i], g, f);
      x[n][i] = rows.template store<R>(p.x_out, n, e, f);
    });
  });
  modulation.ahead();
  RowMoments m[kRows];
  row_moments<Plan::kStatistics, Shape>(x, p.dim, p.inv_dim, p.eps, shared, m);
  store_normalised<T>(rows, x, m, modulation, p.y);
}

template <typename T, typename R, typename Y = void*>
__global__ void __launch_bounds__(256) residual_norm_any(const __grid_constant__ ResidualNormKernelParams<Y> p) {
  __shared__ float shared[2][1][kMaxWarps];
  wait_for_previous_grid();
  allow_next_grid();
  const uint32_t batch = blockIdx.y;
  const int64_t row = static_cast<int64_t>(batch) * p.tokens + blockIdx.x, start = row * p.dim;
  const R* x = static_cast<const R*>(p.x) + start;
  const T* delta = static_cast<const T*>(p.delta) + start;
  R* x_out = static_cast<R*>(p.x_out) + start;
  const float* gate = batch_channels(p.gate, batch);
  const float* scale = batch_channels(p.scale, batch);
  const float* shift = batch_channels(p.shift, batch);
  for (uint32_t e = threadIdx.x; e < p.dim; e += blockDim.x) {
    x_out[e] = from_float<R>(fmaf(to_float(delta[e]), modulation_at(gate, e, 1.f), to_float(x[e])));
  }
  // What other threads wrote to x_out is read after the barriers of the statistics alone.
  const RowMoments m = row_moments_any(x_out, p.dim, p.inv_dim, p.eps, shared);
  store_row_any<T>(p.y, row, p.dim, [&](uint32_t e) {
    return fmaf((to_float(x_out[e]) - m.mean) * m.inv_std, 1.f + modulation_at(scale, e, 0.f),
                modulation_at(shift, e, 0.f));
  });
}

template <typename Params, typename Y>
ResidualNormKernelParams<Y> residual_norm_params(const Params& a, const Y& y) {
  return {a.x,
          a.delta,
          a.gate,
          a.shift,
          a.scale,
          a.x_out,
          y,
          static_cast<uint32_t>(a.tokens),
          static_cast<uint32_t>(a.dim),
          1.f / static_cast<float>(a.dim),
          a.eps};
}

}  // namespace lingbot::cuda
