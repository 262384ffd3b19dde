// y = activation((x w^T) * (x_scale * w_scale) + bias): int8 rows and int8 weights, sums exact in int32.
#include "parallel.h"
#include "quantize.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace lingbot::cpu::LINGBOT_ISA {
namespace {

// Codes of a step of the inner loop, and sums of products of two steps. Products of codes as int16, added up in pairs,
// are exact in int32; adding them up as int16 would not be.
#if defined(__AVX512VNNI__)
typedef __m512i Sums;
typedef __m512i Codes;
constexpr int kStep = 64;
// The instruction takes unsigned codes of x: 128 is added to them here, and 128 * sum(w) is taken off the sums.
constexpr int kOffset = 128;
LINGBOT_INLINE Codes codes_of_x(const int8_t* p) {
  return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
}
LINGBOT_INLINE Codes codes_of_w(const int8_t* p) { return _mm512_loadu_si512(p); }
LINGBOT_INLINE Sums add_products(Sums sums, Codes x, Codes w) { return _mm512_dpbusd_epi32(sums, x, w); }
LINGBOT_INLINE int32_t total(Sums sums) { return _mm512_reduce_add_epi32(sums); }
LINGBOT_INLINE Codes ones() { return _mm512_set1_epi8(1); }
#elif defined(__AVX512BW__)
typedef __m512i Sums;
typedef __m512i Codes;
constexpr int kStep = 32, kOffset = 0;
LINGBOT_INLINE Codes codes_of_x(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LINGBOT_INLINE Codes codes_of_w(const int8_t* p) { return codes_of_x(p); }
LINGBOT_INLINE Sums add_products(Sums sums, Codes x, Codes w) {
  return _mm512_add_epi32(sums, _mm512_madd_epi16(x, w));
}
LINGBOT_INLINE int32_t total(Sums sums) { return _mm512_reduce_add_epi32(sums); }
LINGBOT_INLINE Codes ones() { return _mm512_set1_epi16(1); }
#elif defined(__AVX2__)
typedef __m256i Sums;
typedef __m256i Codes;
constexpr int kStep = 16, kOffset = 0;
LINGBOT_INLINE Codes codes_of_x(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
LINGBOT_INLINE Codes codes_of_w(const int8_t* p) { return codes_of_x(p); }
LINGBOT_INLINE Sums add_products(Sums sums, Codes x, Codes w) {
  return _mm256_add_epi32(sums, _mm256_madd_epi16(x, w));
}
LINGBOT_INLINE int32_t total(Sums sums) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
LINGBOT_INLINE Codes ones() { return _mm256_set1_epi16(1); }
#elif defined(__SSE2__)
typedef __m128i Sums;
typedef __m128i Codes;
constexpr int kStep = 8, kOffset = 0;
LINGBOT_INLINE Codes codes_of_x(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
}
LINGBOT_INLINE Codes codes_of_w(const int8_t* p) { return codes_of_x(p); }
LINGBOT_INLINE Sums add_products(Sums sums, Codes x, Codes w) { return _mm_add_epi32(sums, _mm_madd_epi16(x, w)); }
LINGBOT_INLINE int32_t total(Sums sums) {
  const __m128i two = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
LINGBOT_INLINE Codes ones() { return _mm_set1_epi16(1); }
#else
typedef int32_t Sums __attribute__((vector_size(16)));
typedef int32_t Codes __attribute__((vector_size(16)));
typedef int8_t FourBytes __attribute__((vector_size(4)));
constexpr int kStep = 4, kOffset = 0;
LINGBOT_INLINE Codes codes_of_x(const int8_t* p) { return __builtin_convertvector(load_raw<FourBytes>(p), Codes); }
LINGBOT_INLINE Codes codes_of_w(const int8_t* p) { return codes_of_x(p); }
LINGBOT_INLINE Sums add_products(Sums sums, Codes x, Codes w) { return sums + x * w; }
LINGBOT_INLINE int32_t total(Sums sums) { return sums[0] + sums[1] + sums[2] + sums[3]; }
LINGBOT_INLINE Codes ones() { return Codes{1, 1, 1, 1}; }
#endif

constexpr int kTile = 4;                   // rows of x, and of w, whose products are summed at a time
constexpr int kRows = 32, kColumns = 64;   // of y that one task makes
constexpr int kMaxInputs = (1 << 17) - 1;  // 128 * 128 * inputs fits an int32
static_assert(kRows % kTile == 0 && kColumns % kTile == 0 && kColumns % kLanes == 0, "whole tiles");

using Rows4 = const int8_t* [kTile];

LINGBOT_INLINE uint32_t tail_product(const int8_t* x, const int8_t* w, int from, int inputs) {
  int32_t sum = 0;
  for (int k = from; k < inputs; ++k) sum += x[k] * w[k];
  return static_cast<uint32_t>(sum);
}

// kOffset * the sum of each row of w over whole steps. Sums are taken modulo 2^32: with an offset they may leave int32
// on their way to a result that fits.
LINGBOT_INLINE void offsets_of(const Rows4& w, int whole, uint32_t (&offsets)[kTile]) {
  for (int n = 0; n < kTile; ++n) offsets[n] = 0;
  if constexpr (kOffset != 0) {
    for (int n = 0; n < kTile; ++n) {
      Sums sums = {};
      for (int k = 0; k < whole; k += kStep) sums = add_products(sums, ones(), codes_of_w(w[n] + k));
      offsets[n] = static_cast<uint32_t>(total(sums)) * kOffset;
    }
  }
}

LINGBOT_INLINE void multiply_tile(const Rows4& x, const Rows4& w, const uint32_t (&offsets)[kTile], int inputs,
                                  int32_t* sums_of_first_row) {
  Sums sums[kTile][kTile] = {};
  const int whole = inputs / kStep * kStep;
  for (int k = 0; k < whole; k += kStep) {
    Codes of_w[kTile];
    _Pragma("GCC unroll 4") for (int n = 0; n < kTile; ++n) of_w[n] = codes_of_w(w[n] + k);
    _Pragma("GCC unroll 4") for (int m = 0; m < kTile; ++m) {
      const Codes of_x = codes_of_x(x[m] + k);
      _Pragma("GCC unroll 4") for (int n = 0; n < kTile; ++n) sums[m][n] = add_products(sums[m][n], of_x, of_w[n]);
    }
  }
  _Pragma("GCC unroll 4") for (int m = 0; m < kTile; ++m) {
    _Pragma("GCC unroll 4") for (int n = 0; n < kTile; ++n) {
      const uint32_t sum =
          static_cast<uint32_t>(total(sums[m][n])) - offsets[n] + tail_product(x[m], w[n], whole, inputs);
      sums_of_first_row[m * kColumns + n] = static_cast<int32_t>(sum);
    }
  }
}

// Rows first, first + 1 ... of a matrix; the last of `count` again where there are no more.
LINGBOT_INLINE void rows_from(const int8_t* matrix, int64_t first, int64_t count, int inputs, Rows4& rows) {
  for (int i = 0; i < kTile; ++i) rows[i] = matrix + (first + i < count ? first + i : count - 1) * inputs;
}

// exp(x) for x <= 0, to 2 units in the last place; 0 below -87.
LINGBOT_INLINE VecF exp_part(VecF x) {
  const VecF shifted = x * 1.44269504088896f + kRoundToInteger, n = shifted - kRoundToInteger;
  const VecF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact in a product with n
  VecF p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const VecU power = (as_bits(shifted) - 0x4b400000u + 127u) << 23;
  return as_float(select(x < -87.0f, VecU{}, as_bits(p * as_float(power))));
}

// x / 2 * (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) * (x + 0.044715 x^3), without the cancellation that the
// first form has below 0, and with an exponent that is never positive.
LINGBOT_INLINE Lanes gelu_tanh(Lanes lanes) {
  LINGBOT_EACH_PART {
    const VecF x = lanes.part[i];
    const VecF twice = (x + x * x * x * 0.044715f) * 1.5957691216057308f;
    const VecI negative = twice < 0.0f;
    const VecF e = exp_part(as_float(as_bits(twice) | 0x80000000u));
    lanes.part[i] = x * as_float(select(negative, as_bits(e), as_bits(VecF{} + 1.0f))) / (e + 1.0f);
  }
  return lanes;
}

template <class T, class B>
void linear_task(const Int8LinearParams& p, int64_t first_row, int64_t first_column) {
  alignas(64) int32_t sums[kRows][kColumns];
  const int64_t rows = p.rows - first_row < kRows ? p.rows - first_row : kRows;
  const int columns = p.outputs - first_column < kColumns ? static_cast<int>(p.outputs - first_column) : kColumns;
  const int whole = p.inputs / kStep * kStep;
  for (int n = 0; n < columns; n += kTile) {
    Rows4 w;
    uint32_t offsets[kTile];
    rows_from(p.w, first_column + n, p.outputs, p.inputs, w);
    offsets_of(w, whole, offsets);
    for (int m = 0; m < rows; m += kTile) {
      Rows4 x;
      rows_from(p.x, first_row + m, p.rows, p.inputs, x);
      multiply_tile(x, w, offsets, p.inputs, &sums[m][n]);
    }
  }
  const B* bias = static_cast<const B*>(p.bias);
  for (int64_t m = 0; m < rows; ++m) {
    const float x_scale = p.x_scale[first_row + m];
    T* y = static_cast<T*>(p.y) + (first_row + m) * p.outputs + first_column;
    each_block(columns, [&](int n, int count) LINGBOT_LAMBDA {
      Lanes value;
      LINGBOT_EACH_PART value.part[i] = __builtin_convertvector(load_raw<VecI>(&sums[m][n + i * kWidth]), VecF);
      value = value * (load(p.w_scale + first_column + n, count) * x_scale);
      if (bias != nullptr) value = value + load(bias + first_column + n, count);
      store(y + n, p.gelu ? gelu_tanh(value) : value, count);
    });
  }
}

}  // namespace

Status int8_linear(const Int8LinearParams& p, int threads) {
  if (p.rows <= 0 || p.outputs == 0) return nullptr;
  if (p.inputs < 0 || p.inputs > kMaxInputs) return "inputs must be in [0, 2^17), so that int32 holds every sum";
  if (p.outputs < 0) return "outputs must not be negative";
  if (p.x_scale == nullptr || p.w_scale == nullptr || p.y == nullptr) return "x_scale, w_scale and y must not be null";
  if (p.inputs > 0 && (p.x == nullptr || p.w == nullptr)) return "x and w must not be null";
  const int64_t tasks_of_rows = (p.rows + kRows - 1) / kRows, tasks_of_columns = (p.outputs + kColumns - 1) / kColumns;
  const int64_t bytes = int64_t{p.inputs} * (kRows + kColumns) * 4;  // as long as that many bytes take to move
  return with_dtype(p.dtype, [&](auto t) -> Status {
    return with_dtype(p.bias_dtype, [&](auto b) -> Status {
      parallel_for(tasks_of_rows * tasks_of_columns, bytes, threads, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          linear_task<decltype(t), decltype(b)>(p, task % tasks_of_rows * kRows, task / tasks_of_rows * kColumns);
        }
      });
      return nullptr;
    });
  });
}

}  // namespace lingbot::cpu::LINGBOT_ISA
