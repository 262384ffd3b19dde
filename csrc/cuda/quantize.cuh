// Rows as int8 codes with a scale each: signs, Hadamard rotation of blocks of 128 channels, quantisation. Every
// rounding is spelled out, so that a row of given float32 values has the same codes and scale here, in Triton and on
// the CPU:
//
//   u = signs * y; stages (a + b, a - b) of values 1, 2, 4 ... 64 apart; u = u * (1 / sqrt(128))
//   amax = largest |u|; scale = amax / 127; code = round_to_nearest_even(u * (127 / amax))
//
// A row with amax < 2^-119 has scale 0, one with a NaN or Inf has scale NaN; the codes of both are 0.
#pragma once

#include "codes.cuh"
#include "row_norm.cuh"

namespace lingbot::cuda {

constexpr float kRotationScale = 0.088388347648318447f;  // 1 / sqrt(128)

// Where the rows of a launch go. kRotate: the Hadamard rotation comes before the quantisation.
template <bool kRotate>
struct Codes {
  static constexpr bool kRotated = kRotate;
  int8_t* codes;        // [rows, width]
  float* row_scale;     // [rows]
  const int8_t* signs;  // [width], +1 or -1; null: +1
  uint32_t width;       // dim rounded up to whole blocks
};

template <bool kRotate>
inline Codes<kRotate> device_codes(const QuantizedRows& out, int32_t dim) {
  return {out.codes, out.row_scale, out.signs, static_cast<uint32_t>(round_up(dim, kRotationBlock))};
}

// How a row lies in a block's registers for a rotation: the kVecs vectors of a thread belong to one block of 128
// channels, 128 / kVecs apart, so that only kLanes threads have to meet.
template <int kVectors, int kRowThreads>
struct RotationShape {
  static constexpr int V = 8, kVecs = kVectors, kThreads = kRowThreads;
  static constexpr int kLanes = kRotationBlock / (V * kVecs), kApart = kRotationBlock / kVecs;

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kLanes; }
  static __device__ __forceinline__ int block_start() {
    return static_cast<int>(threadIdx.x) / kLanes * kRotationBlock;
  }
  static __device__ __forceinline__ int element(int i) { return block_start() + i * kApart + lane() * V; }
};

// Calls f(shape) for a configuration of quantize_config with kMost. The widths 5120, 3072 and 1536 are compiled exactly
// for bfloat16.
template <typename T, int kMost, typename F>
Status with_rotation_shape(const RowConfig& config, F&& f) {
  if (config.width == 1) return f(RowShape<1, 0, 0>{});
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    constexpr int kWide = 640 / kMost, kMiddle = 384 / kMost;
    if (config.exact(kWide, kMost)) return f(RotationShape<kMost, kWide>{});
    if (config.exact(kMiddle, kMost)) return f(RotationShape<kMost, kMiddle>{});
    if (config.exact(96, 2)) return f(RotationShape<2, 96>{});
  }
  switch (config.vectors) {
    case 1: return f(RotationShape<1, 0>{});
    case 2: return f(RotationShape<2, 0>{});
    case 4: return f(RotationShape<4, 0>{});
  }
  return "no kernel for this launch configuration";
}

// Calls f(Codes<kRotate>) for the operand of a launch.
template <typename F>
Status with_codes(const QuantizedRows& out, int32_t dim, F&& f) {
  return out.rotate ? f(device_codes<true>(out, dim)) : f(device_codes<false>(out, dim));
}

inline Status quantized_problem(const QuantizedRows& out) {
  return out.codes && out.row_scale ? nullptr : "codes and row_scale must not be null";
}

inline bool codes_aligned(const QuantizedRows& out) { return aligned(out.codes, 8) && aligned(out.signs, 8); }

// Elements of a vector where all operands of a launch are aligned: rows in registers are made of vectors of 8 elements,
// two loads where they are float32.
inline int quantize_width(bool all_aligned, int32_t dim) { return all_aligned && dim % 8 == 0 ? 8 : 1; }

// A row a block. kRegisters: what a thread of an exact shape may have, so that many rows are in flight; without a bound
// modulation is read far ahead of its use. A float32 vector of 8 is 32 bytes a thread, fetched by two loads of half a
// sector each: the second is to hit L1.
template <typename Shape, typename Y, int kRegisters, StoreHint kStore, typename... Operands>
using QuantizePlan =
    RowPlan<Y::kRotated ? resident_blocks(Shape::kThreads, kRegisters) : 1, 1, ChannelLoad::kLate, Statistics::kTwoPass,
            ((sizeof(Operands) == 4) || ...) ? LoadHint::kEvictFirst : LoadHint::kNoAllocate, kStore>;

__device__ __forceinline__ float minus_if(bool negative) { return negative ? -1.f : 1.f; }

__device__ __forceinline__ float flip_sign(float x, uint32_t sign) {  // by bit 31 of `sign`
  return __uint_as_float(__float_as_uint(x) ^ (sign & 0x80000000u));
}

// Eight elements times the signs of their channels.
__device__ __forceinline__ void apply_signs(const int8_t* signs, float (&x)[8]) {
  const uint2 bytes = *reinterpret_cast<const uint2*>(signs);
#pragma unroll
  for (int j = 0; j < 8; ++j) x[j] = flip_sign(x[j], (j < 4 ? bytes.x : bytes.y) << (24 - 8 * (j % 4)));
}

// The same before they are unpacked.
template <typename T>
__device__ __forceinline__ void apply_signs(const int8_t* signs, Vec<T, 8>& x) {
  if constexpr (sizeof(T) == 2) {
    const uint2 bytes = *reinterpret_cast<const uint2*>(signs);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      x.word[k] ^= __byte_perm(k < 2 ? bytes.x : bytes.y, 0, k % 2 ? 0x3020 : 0x1000) & 0x80008000u;
  } else {
    float f[8];
    unpack(x, f);
    apply_signs(signs, f);
    x = pack<T, 8>(f);
  }
}

// One stage: a + b, a - b of values `apart` from each other.
template <int kApart, int N>
__device__ __forceinline__ void butterfly(float (&x)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (j & kApart) continue;
    const float a = x[j], b = x[j + kApart];
    x[j] = a + b, x[j + kApart] = a - b;
  }
}

// The Hadamard product of a block of 128 channels, not scaled, held by Shape::kLanes threads. Between two lanes a stage
// trades halves: each keeps the four values of one kind and sends the other four, then adds and subtracts what it has.
// Which half a lane keeps depends on its number; it is put in the lower registers by the stage before, as a choice of
// sign in an fma (a product with +-1 is exact), so that nothing has to be selected. Differences may be left negated by
// this. Afterwards x[i][4 * half + j] is plus or minus channel rotated_channel(i, half) + j, `sign[half]` saying which.
template <typename Shape, int kVecs>
__device__ __forceinline__ void hadamard(float (&x)[kVecs][8], float (&sign)[2]) {
  static_assert(kVecs == Shape::kVecs, "a row of this shape");
  const int lane = Shape::lane();
  const float first = minus_if(lane & 1);
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    butterfly<1>(x[i]);
    butterfly<2>(x[i]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float a = x[i][j], b = x[i][j + 4];
      x[i][j] = fmaf(b, first, a), x[i][j + 4] = fmaf(b, -first, a);
    }
  }
  sign[0] = 1.f;
#pragma unroll
  for (int bit = 1; bit < Shape::kLanes; bit *= 2) {
    const float next = minus_if(lane & (2 * bit) & (Shape::kLanes - 1));
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float kept = x[i][j], got = __shfl_xor_sync(0xffffffffu, x[i][j + 4], bit);
        x[i][j] = fmaf(got, next, kept), x[i][j + 4] = fmaf(got, -next, kept);
      }
    }
    if (lane & bit && lane & (2 * bit) & (Shape::kLanes - 1)) sign[0] = -sign[0];
  }
  sign[1] = lane & (Shape::kLanes / 2) ? -sign[0] : sign[0];
  if constexpr (kVecs >= 2) {
#pragma unroll
    for (int i = 0; i < kVecs; i += 2) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float a = x[i][j], b = x[i + 1][j];
        x[i][j] = a + b, x[i + 1][j] = a - b;
      }
    }
  }
  if constexpr (kVecs == 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float a = x[i][j], b = x[i + 2][j];
        x[i][j] = a + b, x[i + 2][j] = a - b;
      }
    }
  }
}

template <typename Shape>
__device__ __forceinline__ int rotated_channel(int i, int half) {
  return Shape::block_start() + i * Shape::kApart + half * (Shape::kApart / 2) + Shape::lane() * 4;
}

// The largest of all threads' magnitudes, in each of them; one barrier. As integers they keep their order, and a NaN is
// larger than Inf. To be called once a kernel.
__device__ __forceinline__ float row_amax(float magnitude) {
  __shared__ uint32_t of_warp[kMaxWarps];
  uint32_t largest = __reduce_max_sync(0xffffffffu, __float_as_uint(magnitude));
  if (blockDim.x > 32) {
    const uint32_t lane = threadIdx.x & 31;
    if (lane == 0) of_warp[threadIdx.x >> 5] = largest;
    __syncthreads();
    largest = __reduce_max_sync(0xffffffffu, lane < blockDim.x >> 5 ? of_warp[lane] : 0u);
  }
  return __uint_as_float(largest);
}

// Of a row with this largest magnitude; one thread stores its scale.
__device__ __forceinline__ Quantizer quantizer(float amax, float* scale) {
  if (threadIdx.x == 0) *scale = scale_of(amax);
  return quantizer(amax);
}

// Codes and scale of a row whose values times signs lie in a block's registers, zeros from channel dim on.
template <typename Shape, bool kRotate, int kVecs>
__device__ __forceinline__ void quantize_row(float (&y)[kVecs][8], const Codes<kRotate>& out, int64_t row) {
  float sign[2] = {1.f, 1.f};
  if constexpr (kRotate) hadamard<Shape>(y, sign);
  float most = 0.f;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) most = larger_magnitude(most, y[i][j]);
  }
  most = row_amax(most);
  if constexpr (kRotate) most *= kRotationScale, sign[0] *= kRotationScale, sign[1] *= kRotationScale;
  const Quantizer q = quantizer(most, out.row_scale + row);
  if (Shape::kThreads == 0 && Shape::block_start() >= static_cast<int>(out.width)) return;
  int8_t* codes = out.codes + row * out.width;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if constexpr (kRotate) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float u[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) u[j] = __fmul_rn(y[i][4 * half + j], sign[half]);
        *reinterpret_cast<uint32_t*>(codes + rotated_channel<Shape>(i, half)) = q.four(u);
      }
    } else {
      *reinterpret_cast<uint2*>(codes + Shape::element(i)) = make_uint2(q.four(y[i]), q.four(y[i] + 4));
    }
  }
}

// The normalised row of a block, quantised instead of rounded.
template <typename T, typename Shape, typename Plan, typename R, int V, int kVecs, int kRows, typename Read,
          bool kRotate>
__device__ __forceinline__ void store_normalised(const BlockRows<Shape, Plan>& rows, Vec<R, V> (&x)[kRows][kVecs],
                                                 const RowMoments (&moments)[kRows],
                                                 const SharedChannels<Shape, Plan, Read>& channels,
                                                 const Codes<kRotate>& out) {
  static_assert(kRows == 1, "a block is one row");
  float y[kVecs][V] = {};
  for_each_vector<Shape>(rows.dim, [&](int i, int e) {
    float weight[V], bias[V];
    channels.at(i, e).affine(weight, bias);
    normalise(x[0][i], moments[0], weight, bias, y[i]);
    if (out.signs) apply_signs(out.signs + e, y[i]);
  });
  quantize_row<Shape>(y, out, rows.index(0));
}

// The same of value(e) for each element e, which is asked for twice: warps take the blocks of 128 channels in turn, a
// lane 4 neighbours.
template <typename T, bool kRotate, typename Value>
__device__ __forceinline__ void store_row_any(const Codes<kRotate>& out, int64_t row, uint32_t dim,
                                              const Value& value) {
  const uint32_t lane = threadIdx.x & 31, first = (threadIdx.x >> 5) * kRotationBlock + 4 * lane;
  const auto block_values = [&](uint32_t e, float (&u)[4]) {
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      u[j] = e + j < dim ? value(e + j) : 0.f;
      if (out.signs && out.signs[e + j] < 0) u[j] = -u[j];
    }
    if constexpr (kRotate) {
      butterfly<1>(u);
      butterfly<2>(u);
#pragma unroll
      for (int bit = 1; bit < 32; bit *= 2) {
#pragma unroll
        for (int j = 0; j < 4; ++j) u[j] = fmaf(u[j], minus_if(lane & bit), __shfl_xor_sync(0xffffffffu, u[j], bit));
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) u[j] = __fmul_rn(u[j], kRotationScale);
    }
  };
  const uint32_t step = (blockDim.x >> 5) * kRotationBlock;
  float most = 0.f, u[4];
  for (uint32_t e = first; e < out.width; e += step) {
    block_values(e, u);
#pragma unroll
    for (int j = 0; j < 4; ++j) most = larger_magnitude(most, u[j]);
  }
  const Quantizer q = quantizer(row_amax(most), out.row_scale + row);
  int8_t* codes = out.codes + row * out.width;
  for (uint32_t e = first; e < out.width; e += step) {
    block_values(e, u);
    const uint32_t word = q.four(u);
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) codes[e + j] = static_cast<int8_t>(word >> (8 * j));
  }
}

}  // namespace lingbot::cuda
