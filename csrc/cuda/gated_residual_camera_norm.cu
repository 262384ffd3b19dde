// x1 = x + delta * gate; x_out = (1 + cam_scale) * x1 + cam_shift, rounded to the residual type once;
// y = layer_norm(x_out) * weight + bias of the rounded x_out.
#include "gated_residual_camera_norm.cuh"

namespace lingbot::cuda {

inline CameraNormKernelParams<void*> kernel_params(const GatedResidualCameraNormParams& a) {
  return camera_norm_params(a, a.y);
}

Status gated_residual_camera_norm(const GatedResidualCameraNormParams& a, void* stream) {
  if (Status s = row_shape_problem(a.batch, a.tokens, a.dim)) return s;
  if (Status s = camera_problem(a.cam_scale, a.cam_shift)) return s;
  if (a.batch == 0 || a.tokens == 0) return nullptr;
  DeviceInfo device = {};
  if (Status s = device_info(&device)) return s;
  const bool vectors = aligned(a.x, 16) && aligned(a.delta, 16) &&
                       camera_aligned(a.cam_scale, a.cam_shift, a.weight, a.bias) && aligned(a.x_out, 16) &&
                       aligned(a.y, 16) && modulation_aligned(a.gate);
  const RowConfig config = residual_row_config(a.dim, row_width(vectors, a.dim, a.dtype, a.residual_dtype));
  const CameraNormKernelParams<void*> p = kernel_params(a);
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
