// x_out = x + delta * gate, rounded to the residual type; y = layer_norm(x_out) * (1 + scale) + shift of the rounded
// x_out.
#include "residual_norm_modulate.cuh"

namespace lingbot::cuda {

inline ResidualNormKernelParams<void*> kernel_params(const ResidualNormModulateParams& a) {
  return residual_norm_params(a, a.y);
}

Status residual_norm_modulate(const ResidualNormModulateParams& a, void* stream) {
  if (Status s = row_shape_problem(a.batch, a.tokens, a.dim)) return s;
  if (a.batch == 0 || a.tokens == 0) return nullptr;
  DeviceInfo device = {};
  if (Status s = device_info(&device)) return s;
  const bool vectors = aligned(a.x, 16) && aligned(a.delta, 16) && aligned(a.x_out, 16) && aligned(a.y, 16) &&
                       modulation_aligned(a.gate) && modulation_aligned(a.shift) && modulation_aligned(a.scale);
  const RowConfig config = residual_row_config(a.dim, row_width(vectors, a.dim, a.dtype, a.residual_dtype));
  const ResidualNormKernelParams<void*> p = kernel_params(a);
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
