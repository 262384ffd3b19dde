// From a runtime Dtype to a type.
#pragma once

#include "../params.h"
#include "simd.h"

namespace lingbot::cpu::LINGBOT_ISA {
namespace {

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

template <class F>
Status with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32: return f(float{});
    case Dtype::kFloat16: return f(Float16{});
    case Dtype::kBFloat16: return f(BFloat16{});
  }
  return "dtype must be float32, float16 or bfloat16";
}

// f(R{}, T{}) for a residual type R that is T or float32.
template <class F>
Status with_dtypes(Dtype residual, Dtype dtype, const F& f) {
  if (residual != dtype && residual != Dtype::kFloat32) return "the residual must be float32 or of the compute dtype";
  return with_dtype(dtype, [&](auto t) -> Status { return residual == dtype ? f(t, t) : f(float{}, t); });
}

}  // namespace
}  // namespace lingbot::cpu::LINGBOT_ISA
