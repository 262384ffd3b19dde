// x_out = x + delta * gate, rounded to the residual type.
#include <algorithm>

#include "row_norm.cuh"

namespace lingbot::cuda {

struct GatedResidualKernelParams {
  const void* x;      // [batch, tokens, dim], R
  const void* delta;  // T
  Modulation gate;
  void* x_out;  // R
  uint32_t tokens, dim;
};

// A thread owns V channels: their gate is read once, then kRows rows at a time are in flight. V = 1: element by
// element.
template <typename T, typename R, int V, int kRows, LoadHint kLoad, StoreHint kStore>
__global__ void __launch_bounds__(256) gated_residual_columns(const __grid_constant__ GatedResidualKernelParams p) {
  wait_for_previous_grid();
  allow_next_grid();
  const uint32_t e = (blockIdx.x * blockDim.x + threadIdx.x) * V, batch = blockIdx.z;
  if (e >= p.dim) return;
  const int64_t start = static_cast<int64_t>(batch) * p.tokens * p.dim + e;
  const R* x = static_cast<const R*>(p.x) + start;
  const T* delta = static_cast<const T*>(p.delta) + start;
  R* x_out = static_cast<R*>(p.x_out) + start;
  const float* gate = batch_channels(p.gate, batch);
  if constexpr (V == 1) {
    const float g = modulation_at(gate, e, 1.f);
    for (uint32_t token = blockIdx.y; token < p.tokens; token += gridDim.y) {
      const int64_t at = static_cast<int64_t>(token) * p.dim;
      x_out[at] = from_float<R>(fmaf(to_float(delta[at]), g, to_float(x[at])));
    }
  } else {
    float g[V];
    for (uint64_t first = static_cast<uint64_t>(blockIdx.y) * kRows; first < p.tokens;
         first += static_cast<uint64_t>(gridDim.y) * kRows) {
      Vec<R, V> rows[kRows];
      Vec<T, V> deltas[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int64_t at = static_cast<int64_t>(first + i) * p.dim;
        if (first + i < p.tokens)
          rows[i] = load_stream<kLoad, V>(x + at), deltas[i] = load_stream<kLoad, V>(delta + at);
      }
      load_modulation<V>(gate, e, 1.f, g);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (first + i >= p.tokens) break;
        float f[V], d[V];
        unpack(rows[i], f);
        unpack(deltas[i], d);
#pragma unroll
        for (int j = 0; j < V; ++j) f[j] = fmaf(d[j], g[j], f[j]);
        store_vec<kStore>(x_out + static_cast<int64_t>(first + i) * p.dim, pack<R, V>(f));
      }
    }
  }
}

inline GatedResidualKernelParams kernel_params(const GatedResidualParams& a) {
  return {a.x, a.delta, a.gate, a.x_out, static_cast<uint32_t>(a.tokens), static_cast<uint32_t>(a.dim)};
}

Status gated_residual(const GatedResidualParams& a, void* stream) {
  if (Status s = row_shape_problem(a.batch, a.tokens, a.dim)) return s;
  if (a.batch == 0 || a.tokens == 0) return nullptr;
  DeviceInfo device = {};
  if (Status s = device_info(&device)) return s;
  const bool vectors = aligned(a.x, 16) && aligned(a.delta, 16) && aligned(a.x_out, 16) && modulation_aligned(a.gate);
  const ColumnConfig config = column_config(a.dim, row_width(vectors, a.dim, a.dtype, a.residual_dtype));
  const GatedResidualKernelParams p = kernel_params(a);
  const dim3 grid(static_cast<uint32_t>(ceil_div(a.dim / config.width, config.threads)),
                  static_cast<uint32_t>(std::min(ceil_div(a.tokens, config.rows), kMaxGridYZ)),
                  static_cast<uint32_t>(a.batch));
  const dim3 block(config.threads);
  return with_types(a.dtype, a.residual_dtype, [&](auto t, auto r) -> Status {
    using T = typename decltype(t)::type;
    using R = typename decltype(r)::type;
    const bool overlap = device.capability >= 90;
    constexpr LoadHint kLoad = LoadHint::kNoAllocate;
    constexpr StoreHint kStore = StoreHint::kWriteBack;
    if (config.width == 1)
      return launch(gated_residual_columns<T, R, 1, 1, kLoad, kStore>, grid, block, 0, stream, overlap, p);
    return launch(gated_residual_columns<T, R, kVectorElements<T, R>, 1, kLoad, kStore>, grid, block, 0, stream,
                  overlap, p);
  });
}

}  // namespace lingbot::cuda
