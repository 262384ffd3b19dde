// Rows of activations as int8 codes with a scale each, after signs and a Hadamard rotation of their channels.
#include "quantize.cuh"

namespace lingbot::cuda {

template <bool kRotate>
struct RotateQuantizeKernelParams {
  const void* x;  // [batch, tokens, dim], T, rows x_token apart
  int64_t x_batch, x_token;
  uint32_t tokens, dim;
  Codes<kRotate> out;
};

template <typename T, typename Shape, typename Plan, bool kRotate>
__global__ void __launch_bounds__(Shape::kThreads == 0 ? max_row_threads(Shape::kVecs) : Shape::kThreads,
                                  Plan::kMinBlocks)
    rotate_quantize_rows(const __grid_constant__ RotateQuantizeKernelParams<kRotate> p) {
  constexpr int V = Shape::V, kVecs = Shape::kVecs;
  wait_for_previous_grid();
  allow_next_grid();
  const uint32_t token = blockIdx.x, batch = blockIdx.y;
  Vec<T, V> x[kVecs];
  load_row<Plan::kLoad, Shape>(static_cast<const T*>(p.x) + batch * p.x_batch + token * p.x_token, true, p.dim, x);
  if (p.out.signs) for_each_vector<Shape>(p.dim, [&](int i, int e) { apply_signs(p.out.signs + e, x[i]); });
  float y[kVecs][V];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) unpack(x[i], y[i]);
  quantize_row<Shape>(y, p.out, static_cast<int64_t>(batch) * p.tokens + token);
}

template <typename T, bool kRotate>
__global__ void __launch_bounds__(256)
    rotate_quantize_any(const __grid_constant__ RotateQuantizeKernelParams<kRotate> p) {
  wait_for_previous_grid();
  allow_next_grid();
  const uint32_t token = blockIdx.x, batch = blockIdx.y;
  const T* in = static_cast<const T*>(p.x) + batch * p.x_batch + token * p.x_token;
  store_row_any<T>(p.out, static_cast<int64_t>(batch) * p.tokens + token, p.dim,
                   [&](uint32_t e) { return to_float(in[e]); });
}

template <bool kRotate>
RotateQuantizeKernelParams<kRotate> kernel_params(const RotateQuantizeParams& a, const Codes<kRotate>& codes) {
  return {a.x.ptr, a.x.batch_stride, a.x.token_stride, static_cast<uint32_t>(a.tokens), static_cast<uint32_t>(a.dim),
          codes};
}

Status rotate_quantize(const RotateQuantizeParams& a, void* stream) {
  if (Status s = row_shape_problem(a.batch, a.tokens, a.dim)) return s;
  if (a.batch == 0 || a.tokens == 0) return nullptr;
  if (Status s = quantized_problem(a.out)) return s;
  DeviceInfo device = {};
  if (Status s = device_info(&device)) return s;
  const bool vectors =
      rows_aligned(a.x.ptr, a.x.batch_stride, a.x.token_stride, element_size(a.dtype), 16) && codes_aligned(a.out);
  const RowConfig config = quantize_config(a.dim, quantize_width(vectors, a.dim), 4);
  const dim3 grid(static_cast<uint32_t>(a.tokens), static_cast<uint32_t>(a.batch)), block(config.threads);
  return with_type(a.dtype, [&](auto t) -> Status {
    using T = typename decltype(t)::type;
    return with_rotation_shape<T, 4>(config, [&](auto shape) -> Status {
      using Shape = decltype(shape);
      return with_codes(a.out, a.dim, [&](auto codes) -> Status {
        constexpr bool kRotate = decltype(codes)::kRotated;
        const RotateQuantizeKernelParams<kRotate> p = kernel_params(a, codes);
        const bool overlap = device.capability >= 90;
        if constexpr (Shape::V == 1) {
          return launch(rotate_quantize_any<T, kRotate>, grid, block, 0, stream, overlap, p);
        } else {
          using Plan = QuantizePlan<Shape, decltype(codes), 64, StoreHint::kWriteBack, T>;
          return launch(rotate_quantize_rows<T, Shape, Plan, kRotate>, grid, block, 0, stream, overlap, p);
        }
      });
    });
  });
}

}  // namespace lingbot::cuda
