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

// A block is Plan::kRows rows; the modulation is read through L1.
template <typename T, typename R, typename Shape, typename Plan>
__global__ void __launch_bounds__(Shape::kThreads == 0 ? max_row_threads(Shape::kVecs) : Shape::kThreads,
                                  Plan::kMinBlocks)
    residual_norm_rows(const __grid_constant__ ResidualNormKernelParams p) {
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
  row_moments<Plan::kStatistics, Shape::kThreads>(x, p.dim, p.inv_dim, p.eps, shared, m);
  store_normalised<T>(rows, x, m, modulation, p.y);
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
  const RowConfig config = residual_row_config(a.dim, row_width(vectors, a.dim, a.dtype, a.residual_dtype));
  const ResidualNormKernelParams p = kernel_params(a);
  const dim3 grid(p.tokens, static_cast<uint32_t>(a.batch)), block(config.threads);
  return with_types(a.dtype, a.residual_dtype, [&](auto t, auto r) -> Status {
    using T = typename decltype(t)::type;
    using R = typename decltype(r)::type;
    return with_row_shape<T, R>(config, [&](auto shape) -> Status {
      using Shape = decltype(shape);
      const bool overlap = device.capability >= 90;
      if constexpr (Shape::V == 1) {
        return launch(residual_norm_any<T, R>, grid, block, 0, stream, overlap, p);
      } else {
        return launch(residual_norm_rows<T, R, Shape, RowPlan<>>, grid, block, 0, stream, overlap, p);
      }
    });
  });
}

}  // namespace lingbot::cuda
