// y = layer_norm(x) * (1 + scale) + shift: no affine parameters, statistics in float32, one rounding.
#include <algorithm>

#include "layer_norm_modulate.cuh"

namespace lingbot::cuda {

// Blocks step through the rows of their batch gridDim.x apart, the modulation in registers and the next row in flight:
// for so few rows that a grid of single rows would end on a partial wave.
template <typename T, typename R, typename Shape, int kMinBlocks>
__global__ void __launch_bounds__(Shape::kThreads, kMinBlocks)
    layer_norm_steps(const __grid_constant__ LayerNormKernelParams<void*> p) {
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
    row_moments<Plan::kStatistics, Shape>(x, p.dim, p.inv_dim, p.eps, shared, m);
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

inline LayerNormKernelParams<void*> kernel_params(const LayerNormModulateParams& a) {
  return layer_norm_params(a, a.y);
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
  const LayerNormKernelParams<void*> p = kernel_params(a);
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
