// A token's head in int8: what the write to a ring and the push to other ranks' rings share.
#pragma once

#include "quantize.h"

namespace lingbot::cpu::LINGBOT_ISA {
namespace {

// A token's head as codes; returns its scale.
LINGBOT_INLINE float quantize_head(const float* values, int head_dim, int8_t* codes) {
  int32_t largest = 0;
  for (int i = 0; i < head_dim; ++i) {
    int32_t bits;
    __builtin_memcpy(&bits, values + i, sizeof(bits));
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float scale;
  const Quantizer q = quantizer(largest, &scale);
  if (!q.usable) {
    __builtin_memset(codes, 0, head_dim);
    return scale;
  }
  for (int i = 0; i < head_dim; ++i) {
    const float shifted = values[i] * q.inverse + kRoundToInteger;
    int32_t bits;
    __builtin_memcpy(&bits, &shifted, sizeof(bits));
    codes[i] = static_cast<int8_t>(bits);  // the low byte
  }
  return scale;
}

}  // namespace
}  // namespace lingbot::cpu::LINGBOT_ISA
