// Rows as int8 codes with a scale each: signs, Hadamard rotation of blocks of 128 channels, quantisation. The roundings
// are those of csrc/cuda/quantize.cuh, one by one: a row of given float32 values has the same codes and scale.
#pragma once

#include <utility>

#include "dtype.h"

namespace lingbot::cpu::LINGBOT_ISA {
namespace {

typedef int8_t VecByte __attribute__((vector_size(LINGBOT_VECTOR_BYTES / 4)));

constexpr int kBlockParts = kRotationBlock / kWidth;
constexpr float kSmallestAmax = 0x1p-119f;               // above, 127 / amax and amax / 127 are normal numbers
constexpr float kRotationScale = 0.088388347648318447f;  // 1 / sqrt(128)
constexpr float kRoundToInteger = 12582912.0f;           // 1.5 * 2^23: a sum with it has the integer in its low bits
constexpr int kKeptRow = 16384;  // values of a row that are kept between its two passes; a longer one is made twice

constexpr int rotated_width(int dim) { return (dim + kRotationBlock - 1) / kRotationBlock * kRotationBlock; }

// Lane l gets lane l ^ kApart.
template <int kApart, int... kLane>
LINGBOT_INLINE VecF swap_lanes(VecF v, std::integer_sequence<int, kLane...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(v, v, (kLane ^ kApart)...);
#else
  return __builtin_shuffle(v, VecI{(kLane ^ kApart)...});
#endif
}

template <int kApart, int... kLane>
LINGBOT_INLINE VecF butterfly_lanes(VecF v, std::integer_sequence<int, kLane...> lanes) {
  return swap_lanes<kApart>(v, lanes) + v * VecF{(kLane & kApart ? -1.0f : 1.0f)...};
}

// One stage of the Hadamard product: a + b, a - b of values kApart from each other.
template <int kApart>
LINGBOT_INLINE void butterfly(VecF (&v)[kBlockParts]) {
  if constexpr (kApart < kWidth) {
    for (VecF& part : v) part = butterfly_lanes<kApart>(part, std::make_integer_sequence<int, kWidth>{});
  } else {
    constexpr int kStep = kApart / kWidth;
    _Pragma("GCC unroll 32") for (int i = 0; i < kBlockParts; ++i) {
      if (i & kStep) continue;
      const VecF a = v[i], b = v[i + kStep];
      v[i] = a + b;
      v[i + kStep] = a - b;
    }
  }
}

LINGBOT_INLINE void rotate_block(VecF (&v)[kBlockParts]) {
  butterfly<1>(v);
  butterfly<2>(v);
  butterfly<4>(v);
  butterfly<8>(v);
  butterfly<16>(v);
  butterfly<32>(v);
  butterfly<64>(v);
  for (VecF& part : v) part *= kRotationScale;
}

inline Status quantized_problem(const QuantizedRows& out) {
  return out.codes != nullptr && out.row_scale != nullptr ? nullptr : "codes and row_scale must not be null";
}

struct Quantizer {
  float inverse;  // 127 / amax
  bool usable;    // the row has codes other than 0
};

// Of a row whose largest magnitude has these bits: as integers they keep their order, and a NaN is larger than Inf.
inline Quantizer quantizer(int32_t amax_bits, float* scale) {
  float amax;
  __builtin_memcpy(&amax, &amax_bits, sizeof(amax));
  const bool usable = amax >= kSmallestAmax && amax_bits < 0x7f800000;
  *scale = usable ? amax / 127.0f : amax < kSmallestAmax ? 0.0f : __builtin_nanf("");
  return {usable ? 127.0f / amax : 0.0f, usable};
}

// The row `index` of `out`, made of values(i, count): its float32 elements [i, i + count), asked for twice where the
// row is longer than `kept`, which has room for kKeptRow.
template <class Values>
LINGBOT_INLINE void quantize_row(const QuantizedRows& out, int64_t index, int dim, float* kept, const Values& values) {
  const int width = rotated_width(dim);
  const bool keeps = width <= kKeptRow;
  const auto make_block = [&](int start, VecF(&v)[kBlockParts]) LINGBOT_LAMBDA {
    for (int i = 0; i < kRotationBlock; i += kLanes) {
      const int rest = dim - start - i, count = rest < kLanes ? rest : kLanes;
      const Lanes lanes = count > 0 ? keep(values(start + i, count), count) : Lanes{};
      for (int part = 0; part < kParts; ++part) v[i / kWidth + part] = lanes.part[part];
    }
    if (out.signs != nullptr) {
      for (int i = 0; i < kBlockParts; ++i) {
        const VecByte bytes = load_raw<VecByte>(out.signs + start + i * kWidth);
        const VecU sign = reinterpret_cast<VecU>(__builtin_convertvector(bytes, VecI)) & 0x80000000u;
        v[i] = as_float(as_bits(v[i]) ^ sign);
      }
    }
    if (out.rotate) rotate_block(v);
  };
  VecI most = {};
  for (int start = 0; start < width; start += kRotationBlock) {
    VecF v[kBlockParts];
    make_block(start, v);
    for (int i = 0; i < kBlockParts; ++i) {
      const VecI magnitude = reinterpret_cast<VecI>(as_bits(v[i]) & 0x7fffffffu);
      most = magnitude > most ? magnitude : most;
      if (keeps) store_raw(kept + start + i * kWidth, v[i]);
    }
  }
  int32_t largest = 0;
  for (int lane = 0; lane < kWidth; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  const Quantizer q = quantizer(largest, out.row_scale + index);
  int8_t* codes = out.codes + index * width;
  if (!q.usable) {
    __builtin_memset(codes, 0, width);
    return;
  }
  for (int start = 0; start < width; start += kRotationBlock) {
    VecF v[kBlockParts];
    if (!keeps) make_block(start, v);
    for (int i = 0; i < kBlockParts; ++i) {
      const VecF u = keeps ? load_raw<VecF>(kept + start + i * kWidth) : v[i];
      const VecI code = reinterpret_cast<VecI>(as_bits(u * q.inverse + kRoundToInteger));
      store_raw(codes + start + i * kWidth, __builtin_convertvector(code, VecByte));  // their low bytes
    }
  }
}

}  // namespace
}  // namespace lingbot::cpu::LINGBOT_ISA
