// Sixteen float32 lanes, loaded from and stored to float32, float16 or bfloat16, in the vectors of the instruction set
// this file is compiled for. Sums always have the same 64 partial sums and nothing is contracted to fma, so that every
// instruction set gives the same bits.
#pragma once

#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef LINGBOT_ISA
#define LINGBOT_ISA generic
#endif

#define LINGBOT_INLINE inline __attribute__((always_inline))
#define LINGBOT_LAMBDA __attribute__((always_inline))

namespace lingbot::cpu::LINGBOT_ISA {
namespace {

#if defined(__AVX512F__)
#define LINGBOT_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define LINGBOT_VECTOR_BYTES 32
#else
#define LINGBOT_VECTOR_BYTES 16
#endif

typedef float VecF __attribute__((vector_size(LINGBOT_VECTOR_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(LINGBOT_VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(LINGBOT_VECTOR_BYTES)));
typedef uint64_t VecPair __attribute__((vector_size(LINGBOT_VECTOR_BYTES)));
typedef uint16_t VecHalf __attribute__((vector_size(LINGBOT_VECTOR_BYTES / 2)));

constexpr int kLanes = 16;
constexpr int kWidth = LINGBOT_VECTOR_BYTES / 4;
constexpr int kParts = kLanes / kWidth;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

LINGBOT_INLINE VecF as_float(VecU u) { return reinterpret_cast<VecF>(u); }
LINGBOT_INLINE VecU as_bits(VecF f) { return reinterpret_cast<VecU>(f); }
LINGBOT_INLINE VecU select(VecI mask, VecU a, VecU b) { return mask ? a : b; }

template <class V, class P>
LINGBOT_INLINE V load_raw(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class V, class P>
LINGBOT_INLINE void store_raw(P* p, V v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// float32 bits of a bfloat16, rounded to nearest even; a NaN stays one.
LINGBOT_INLINE VecU round_bf16_bits(VecU u) {
  const VecU rounded = u + 0x7fffu + ((u >> 16) & 1u);
  const VecI nan = (u & 0x7fffffffu) > 0x7f800000u;
  return select(nan, u | 0x400000u, rounded) & 0xffff0000u;
}

#if defined(__AVX512F__)
LINGBOT_INLINE VecF from_half(VecHalf h) {
  return reinterpret_cast<VecF>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(h)));
}
LINGBOT_INLINE VecHalf to_half(VecF f) {
  return reinterpret_cast<VecHalf>(_mm512_cvtps_ph(reinterpret_cast<__m512>(f), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__) && defined(__F16C__)
LINGBOT_INLINE VecF from_half(VecHalf h) {
  return reinterpret_cast<VecF>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(h)));
}
LINGBOT_INLINE VecHalf to_half(VecF f) {
  return reinterpret_cast<VecHalf>(_mm256_cvtps_ph(reinterpret_cast<__m256>(f), _MM_FROUND_TO_NEAREST_INT));
}
#else
LINGBOT_INLINE VecF from_half(VecHalf h) {
  const VecU u = __builtin_convertvector(h, VecU);
  const VecU magnitude = (u & 0x7fffu) << 13;
  // Moving the exponent's bias by a product with 2^112 serves subnormals too.
  VecU bits = as_bits(as_float(magnitude) * 0x1p112f);
  const VecI special = magnitude >= (0x7c00u << 13);
  bits |= reinterpret_cast<VecU>(special) & (0xffu << 23);
  return as_float(bits | ((u & 0x8000u) << 16));
}
LINGBOT_INLINE VecHalf to_half(VecF f) {
  const VecU u = as_bits(f);
  const VecU magnitude = u & 0x7fffffffu;
  const VecU normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const VecU subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;  // the addition rounds at 2^-24
  const VecU nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  VecU h = select(magnitude < 0x38800000u, subnormal, normal);
  h = select(magnitude >= 0x47800000u, VecU{} + 0x7c00u, h);
  h = select(magnitude > 0x7f800000u, nan, h);
  return __builtin_convertvector(h | ((u >> 16) & 0x8000u), VecHalf);
}
#endif

LINGBOT_INLINE VecHalf narrow(VecU u) {  // values below 65536
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i v = reinterpret_cast<__m256i>(u);
  return reinterpret_cast<VecHalf>(_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
#else
  return __builtin_convertvector(u, VecHalf);
#endif
}

LINGBOT_INLINE VecF load_part(const float* p) { return load_raw<VecF>(p); }
LINGBOT_INLINE VecF load_part(const Float16* p) { return from_half(load_raw<VecHalf>(p)); }
LINGBOT_INLINE VecF load_part(const BFloat16* p) {
  return as_float(__builtin_convertvector(load_raw<VecHalf>(p), VecU) << 16);
}

LINGBOT_INLINE void store_part(float* p, VecF f) { store_raw(p, f); }
LINGBOT_INLINE void store_part(Float16* p, VecF f) { store_raw(p, to_half(f)); }
LINGBOT_INLINE void store_part(BFloat16* p, VecF f) { store_raw(p, narrow(round_bf16_bits(as_bits(f)) >> 16)); }

LINGBOT_INLINE VecF round_part(VecF f, const float*) { return f; }
LINGBOT_INLINE VecF round_part(VecF f, const Float16*) { return from_half(to_half(f)); }
LINGBOT_INLINE VecF round_part(VecF f, const BFloat16*) { return as_float(round_bf16_bits(as_bits(f))); }

struct Lanes {
  VecF part[kParts];
};

#define LINGBOT_EACH_PART _Pragma("GCC unroll 4") for (int i = 0; i < kParts; ++i)

LINGBOT_INLINE Lanes operator+(Lanes a, const Lanes& b) {
  LINGBOT_EACH_PART a.part[i] += b.part[i];
  return a;
}
LINGBOT_INLINE Lanes operator*(Lanes a, const Lanes& b) {
  LINGBOT_EACH_PART a.part[i] *= b.part[i];
  return a;
}
LINGBOT_INLINE Lanes operator+(Lanes a, float b) {
  LINGBOT_EACH_PART a.part[i] += b;
  return a;
}
LINGBOT_INLINE Lanes operator-(Lanes a, float b) {
  LINGBOT_EACH_PART a.part[i] -= b;
  return a;
}
LINGBOT_INLINE Lanes operator*(Lanes a, float b) {
  LINGBOT_EACH_PART a.part[i] *= b;
  return a;
}

// (a0, b0, a1, b1, ...) -> (b0, a0, b1, a1, ...)
LINGBOT_INLINE Lanes swap_pairs(Lanes a) {
  LINGBOT_EACH_PART {
    const VecPair p = reinterpret_cast<VecPair>(a.part[i]);
    a.part[i] = reinterpret_cast<VecF>((p << 32) | (p >> 32));
  }
  return a;
}

// The value a T would hold.
template <class T>
LINGBOT_INLINE Lanes round_to(Lanes a) {
  LINGBOT_EACH_PART a.part[i] = round_part(a.part[i], static_cast<const T*>(nullptr));
  return a;
}

// The first `count` lanes from memory, zero in the others.
template <class T>
LINGBOT_INLINE Lanes load(const T* p, int count) {
  T tail[kLanes] = {};
  if (count < kLanes) {
    __builtin_memcpy(tail, p, count * sizeof(T));
    p = tail;
  }
  Lanes a;
  LINGBOT_EACH_PART a.part[i] = load_part(p + i * kWidth);
  return a;
}

template <class T>
LINGBOT_INLINE void store(T* p, const Lanes& a, int count) {
  if (count == kLanes) {
    LINGBOT_EACH_PART store_part(p + i * kWidth, a.part[i]);
    return;
  }
  T tail[kLanes];
  LINGBOT_EACH_PART store_part(tail + i * kWidth, a.part[i]);
  __builtin_memcpy(p, tail, count * sizeof(T));
}

LINGBOT_INLINE Lanes keep(const Lanes& a, int count) {
  if (count == kLanes) return a;
  float lanes[kLanes];
  store(lanes, a, kLanes);
  return load(lanes, count);
}

// f(offset, count) over [0, n) in blocks of 16 and a rest.
template <class F>
LINGBOT_INLINE void each_block(int n, const F& f) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, n - i);
}

// Sum over [0, n) of value(offset, count), whose lanes beyond count must be zero. 64 partial sums of runs of 8 values,
// the runs summed in double: rounded to float32 it is the exact sum's rounding for nearly all rows of some thousands.
template <class F>
LINGBOT_INLINE double sum_blocks(int n, const F& value) {
  constexpr int kBlock = 4 * kLanes, kRun = 8 * kBlock;
  double sums[kBlock] = {};
  for (int start = 0; start < n; start += kRun) {
    const int stop = start + kRun < n ? start + kRun : n;
    Lanes run[4] = {};
    int i = start;
    for (; i + kBlock <= stop; i += kBlock) {
      _Pragma("GCC unroll 4") for (int j = 0; j < 4; ++j) run[j] = run[j] + value(i + j * kLanes, kLanes);
    }
    _Pragma("GCC unroll 4") for (int j = 0; j < 4; ++j) {
      const int rest = stop - i - j * kLanes;
      if (rest > 0) run[j] = run[j] + value(i + j * kLanes, rest < kLanes ? rest : kLanes);
    }
    float lanes[kBlock];
    _Pragma("GCC unroll 4") for (int j = 0; j < 4; ++j) store(lanes + j * kLanes, run[j], kLanes);
    for (int i = 0; i < kBlock; ++i) sums[i] += lanes[i];
  }
  for (int width = kBlock / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  return sums[0];
}

}  // namespace
}  // namespace lingbot::cpu::LINGBOT_ISA
