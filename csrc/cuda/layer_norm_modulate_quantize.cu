// codes and scale of layer_norm(x) * (1 + scale) + shift, which is never rounded to anything else.
#include "layer_norm_modulate.cuh"

namespace lingbot::cuda {

Status layer_norm_modulate_quantize(const LayerNormModulateQuantizeParams& a, void* stream) {
  if (Status s = row_shape_problem(a.batch, a.tokens, a.dim)) return s;
  if (a.batch == 0 || a.tokens == 0) return nullptr;
  if (Status s = quantized_problem(a.out)) return s;
  DeviceInfo device = {};
  if (Status s = device_info(&device)) return s;
  const bool vectors =
      aligned(a.x, 16) && modulation_aligned(a.shift) && modulation_aligned(a.scale) && codes_aligned(a.out);
  const RowConfig config = quantize_config(a.dim, quantize_width(vectors, a.dim), 4);
  const dim3 grid(static_cast<uint32_t>(a.tokens), static_cast<uint32_t>(a.batch)), block(config.threads);
  return with_type(a.residual_dtype, [&](auto r) -> Status {
    using R = typename decltype(r)::type;
    return with_rotation_shape<R, 4>(config, [&](auto shape) -> Status {
      using Shape = decltype(shape);
      return with_codes(a.out, a.dim, [&](auto codes) -> Status {
        using Y = decltype(codes);
        const LayerNormKernelParams<Y> p = layer_norm_params(a, codes);
        const bool overlap = device.capability >= 90;
        if constexpr (Shape::V == 1) {
          return launch(layer_norm_any<R, R, Y>, grid, block, 0, stream, overlap, p);
        } else {
          using Plan = QuantizePlan<Shape, decltype(codes), 72, StoreHint::kWriteBack, R>;
          return launch(layer_norm_rows<R, R, Shape, Plan, Y>, grid, block, 0, stream, overlap, p);
        }
      });
    });
  });
}

}  // namespace lingbot::cuda
