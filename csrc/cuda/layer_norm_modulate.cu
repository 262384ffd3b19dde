// y = layer_norm(x) * (1 + scale) + shift: no affine parameters, statistics in float32, one rounding.
#include <algorithm>

#include "row_norm.cuh"

namespace lingbot::cuda {

struct LayerNormKernelParams {
  const void* x;  // [batch, tokens, dim], R
  Modulation shift, scale;
  void* y;  // T
  uint32_t tokens, dim;
  float inv_dim, eps;
};

// A block is Plan::kRows rows; the modulation is read through L1.
template <typename T, typename R, typename Shape, typename Plan>
__global__ void __launch_bounds__(Shape::kThreads == 0 ? max_row_threads(Shape::kVecs) : Shape::kThreads,
                                  Plan::kMinBlocks) layer_norm_rows(const __grid_constant__ LayerNormKernelParams p) {
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
  row_moments<Plan::kStatistics, Shape::kThreads>(x, p.dim, p.inv_dim, p.eps, shared, m);
  store_normalised<T>(rows, x, m, modulation, p.y);
}

// Blocks step through the rows of their batch gridDim.x apart, the modulation in registers and the next row in flight:
// for so few rows that a grid of single rows would end on a partial wave.
template <typename T, typename R, typename Shape, int kMinBlocks>
__global__ void __launch_bounds__(Shape::kThreads, kMinBlocks)
    layer_norm_steps(const __grid_constant__ LayerNormKernelParams p) {
  constexpr int V = Shape::V, kVecs = Shape::kVecs;
  using Plan = RowPlan<kMinBlocks, 1, ChannelLoad::kAhead>;
  static_assert(Shape::kThreads != 0, "for exact shapes");
  __shared__ float shared[2][1][kMaxWarps];
  wait_for_previous_grid();
  allow_next_grid();
  const uint32_t batch = blockIdx.y;
  const int64_t start = static_cast<int64_t>(batch) * p.tokens * p.dim;
  const R* in = static_cast<const R*>(p.x) + start;
  T* out = static_cast<T*>(p.y) + start;

  Vec<R, V> x[1][kVecs];
  load_row<Plan::kLoad, Shape>(in + blockIdx.x * static_cast<uint64_t>(p.dim), true, p.dim, x[0]);
  auto modulation = modulation_channels<Shape, Plan>(p.scale, p.shift, batch, p.dim);
  modulation.ahead();
  for (uint64_t token = blockIdx.x;;) {
    const uint64_t next = token + gridDim.x;
    Vec<R, V> following[kVecs];
    if (next < p.tokens) load_row<Plan::kLoad, Shape>(in + next * p.dim, true, p.dim, following);
    RowMoments m[1];
    row_moments<Plan::kStatistics, Shape::kThreads>(x, p.dim, p.inv_dim, p.eps, shared, m);
    for_each_vector<Shape>(p.dim, [&](int i, int e) {
      float weight[V], bias[V], f[V];
      modulation.at(i, e).affine(weight, bias);
      normalise(x[0][i], m[0], weight, bias, f);
      store_vec<Plan::kStore>(out + token * p.dim + e, pack<T, V>(f));
    });
    if (next >= p.tokens) return;
    token = next;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) x[0][i] = following[i];
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
  const LayerNormConfig config = layer_norm_config(a.dim, row_width(vectors, a.dim, a.dtype, a.residual_dtype),
                                                   a.batch * a.tokens, device.multiprocessors);
  const LayerNormKernelParams p = kernel_params(a);
  const dim3 grid(p.tokens, static_cast<uint32_t>(a.batch)), block(config.row.threads);
  return with_types(a.dtype, a.residual_dtype, [&](auto t, auto r) -> Status {
    using T = typename decltype(t)::type;
    using R = typename decltype(r)::type;
    return with_row_shape<T, R>(config.row, [&](auto shape) -> Status {
      using Shape = decltype(shape);
      const bool overlap = device.capability >= 90;
      if constexpr (Shape::V == 1) {
        return launch(layer_norm_any<T, R>, grid, block, 0, stream, overlap, p);
      } else {
        if constexpr (Shape::kThreads == 320 && Shape::kVecs == 2) {
          if (config.steps) {
            const dim3 steps(std::min(p.tokens, static_cast<uint32_t>(config.steps * device.multiprocessors)), grid.y);
            return launch(layer_norm_steps<T, R, Shape, kLayerNormSteps>, steps, block, 0, stream, overlap, p);
          }
        }
        return launch(layer_norm_rows<T, R, Shape, RowPlan<>>, grid, block, 0, stream, overlap, p);
      }
    });
  });
}

}  // namespace lingbot::cuda
