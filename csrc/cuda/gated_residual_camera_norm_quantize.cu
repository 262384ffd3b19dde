// x1 = x + delta * gate; x_out = (1 + cam_scale) * x1 + cam_shift, rounded to the residual type once; codes and scale
// of layer_norm(x_out) * weight + bias, which is never rounded to anything else.
#include "gated_residual_camera_norm.cuh"

namespace lingbot::cuda {

Status gated_residual_camera_norm_quantize(const GatedResidualCameraNormQuantizeParams& a, void* stream) {
  if (Status s = row_shape_problem(a.batch, a.tokens, a.dim)) return s;
  if (Status s = camera_problem(a.cam_scale, a.cam_shift)) return s;
  if (a.batch == 0 || a.tokens == 0) return nullptr;
  if (Status s = quantized_problem(a.out)) return s;
  DeviceInfo device = {};
  if (Status s = device_info(&device)) return s;
  const bool vectors = aligned(a.x, 16) && aligned(a.delta, 16) &&
                       camera_aligned(a.cam_scale, a.cam_shift, a.weight, a.bias) && aligned(a.x_out, 16) &&
                       modulation_aligned(a.gate) && codes_aligned(a.out);
  const bool fits = a.dtype != Dtype::kFloat32 || a.dim <= kMaxTwoVectorRow;  // else four float32 operands would spill
  const RowConfig config = quantize_config(a.dim, quantize_width(vectors && fits, a.dim), 2);
  const dim3 grid(static_cast<uint32_t>(a.tokens), static_cast<uint32_t>(a.batch)), block(config.threads);
  return with_types(a.dtype, a.residual_dtype, [&](auto t, auto r) -> Status {
    using T = typename decltype(t)::type;
    using R = typename decltype(r)::type;
    return with_rotation_shape<T, 2>(config, [&](auto shape) -> Status {
      using Shape = decltype(shape);
      return with_codes(a.out, a.dim, [&](auto codes) -> Status {
        using Y = decltype(codes);
        const CameraNormKernelParams<Y> p = camera_norm_params(a, codes);
        if constexpr (Shape::V == 1) {
          return launch(camera_norm_any<T, R, Y>, grid, block, 0, stream, device.capability >= 90, p);
        } else if constexpr (Shape::kVecs == 4 && sizeof(T) == 4) {
          return "no kernel for this launch configuration";
        } else {
          using Plan = QuantizePlan<Shape, decltype(codes), 48, StoreHint::kStream, T, R>;
          if (p.cam_scale)
            return launch(camera_norm_rows<T, R, Shape, Plan, true, Y>, grid, block, 0, stream, device.capability >= 90,
                          p);
          return launch(camera_norm_rows<T, R, Shape, Plan, false, Y>, grid, block, 0, stream, device.capability >= 90,
                        p);
        }
      });
    });
  });
}

}  // namespace lingbot::cuda
