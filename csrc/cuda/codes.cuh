// From float32 values to int8 codes with one scale: scale = amax / 127, code = round_to_nearest_even(u * (127 / amax)),
// amax the largest |u|. Zeros (amax < 2^-119) have scale 0, values with a NaN or Inf have scale NaN; the codes of both
// are 0.
#pragma once

#include <cstdint>

namespace lingbot::cuda {

constexpr int kLargestCode = 127;
constexpr float kSmallestAmax = 0x1p-119f;     // above, 127 / amax and amax / 127 are normal numbers
constexpr float kRoundToInteger = 12582912.f;  // 1.5 * 2^23: a sum with it has the integer in its low bits

// The larger magnitude; NaN where one is.
__device__ __forceinline__ float larger_magnitude(float most, float x) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(most), "f"(fabsf(x)));
  return larger;
}

// What turns the values of a row into codes: 127 / amax, and whether the row has codes other than 0.
struct Quantizer {
  float inverse;
  bool usable;

  // The code of u, in the low byte.
  __device__ __forceinline__ uint32_t code(float u) const {
    return __float_as_uint(__fadd_rn(__fmul_rn(u, inverse), kRoundToInteger));
  }

  __device__ __forceinline__ uint32_t four(const float* u) const {
    const uint32_t low = __byte_perm(code(u[0]), code(u[1]), 0x0040),
                   high = __byte_perm(code(u[2]), code(u[3]), 0x0040);
    return usable ? __byte_perm(low, high, 0x5410) : 0u;
  }
};

__device__ __forceinline__ bool has_codes(float amax) { return amax >= kSmallestAmax && amax <= 3.402823466e+38f; }

__device__ __forceinline__ float scale_of(float amax) {
  if (has_codes(amax)) return __fdiv_rn(amax, static_cast<float>(kLargestCode));
  return amax < kSmallestAmax ? 0.f : __int_as_float(0x7fffffff);
}

__device__ __forceinline__ Quantizer quantizer(float amax) {
  return {__fdiv_rn(static_cast<float>(kLargestCode), amax), has_codes(amax)};
}

}  // namespace lingbot::cuda
