// x_out = x + delta * gate, rounded to the residual type; codes and scale of layer_norm(x_out) * (1 + scale) + shift,
// which is never rounded to anything else.
#include "residual_norm_modulate.cuh"

namespace lingbot::cuda {

Status residual_norm_modulate_quantize(const ResidualNormModulateQuantizeParams& a, void* stream) {
  if (Status s = row_shape_problem(a.batch, a.tokens, a.dim)) return s;
  if (a.batch == 0 || a.tokens == 0) return nullptr;
  if (Status s = quantized_problem(a.out)) return s;
  DeviceInfo device = {};
  if (Status s = device_info(&device)) return s;
  const bool vectors = aligned(a.x, 16) && aligned(a.delta, 16) && aligned(a.x_out, 16) && modulation_aligned(a.gate) &&
                       modulation_aligned(a.shift) && modulation_aligned(a.scale) && codes_aligned(a.out);
  const RowConfig config = quantize_config(a.dim, quantize_width(vectors, a.dim), 2);
  const dim3 grid(static_cast<uint32_t>(a.tokens), static_cast<uint32_t>(a.batch)), block(config.threads);
  return with_types(a.dtype, a.residual_dtype, [&](auto t, auto r) -> Status {
    using T = typename decltype(t)::type;
    using R = typename decltype(r)::type;
    return with_rotation_shape<T, 2>(config, [&](auto shape) -> Status {
      using Shape = decltype(shape);
      return with_codes(a.out, a.dim, [&](auto codes) -> Status {
        using Y = decltype(codes);
        const ResidualNormKernelParams<Y> p = residual_norm_params(a, codes);
        const bool overlap = device.capability >= 90;
        if constexpr (Shape::V == 1) {
          return launch(residual_norm_any<T, R, Y>, grid, block, 0, stream, overlap, p);
        } else {
          using Plan = QuantizePlan<Shape, decltype(codes), 48, StoreHint::kWriteBack, T, R>;
          return launch(residual_norm_rows<T, R, Shape, Plan, Y>, grid, block, 0, stream, overlap, p);
        }
      });
    });
  });
}

}  // namespace lingbot::cuda
