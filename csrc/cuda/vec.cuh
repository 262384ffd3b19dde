// Vectors of a row: loads and stores with cache hints, conversion to float32 and back with one rounding.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace lingbot::cuda {

// How a streamed operand is read. All keep it out of L1, where weights and modulation vectors live.
enum class LoadHint {
  kNoAllocate,    // L2 keeps it with normal priority
  kEvictFirst,    // first to leave L1 and L2
  kEvictFirstL2,  // the same for L2, through an access policy
  kPrefetch256,   // as kNoAllocate; L2 fetches 256 bytes at a time
};

enum class StoreHint {
  kWriteBack,  // stays in L2 where it fits: the next kernel reads it from there
  kStream,     // first to leave L2
};

// V elements of T in registers: 8 or 16 bytes, or any multiple of 16.
template <typename T, int V>
struct Vec {
  static constexpr int kBytes = V * static_cast<int>(sizeof(T));
  static_assert(kBytes == 8 || kBytes % 16 == 0, "8 bytes or a multiple of 16");
  uint32_t word[kBytes / 4];
};

namespace detail {

__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Volatile: streamed loads stay in program order, all issued before the first use, and never move above the wait for
// the previous grid.
template <LoadHint kHint>
__device__ __forceinline__ void load16(uint32_t* w, const void* p) {
  if constexpr (kHint == LoadHint::kNoAllocate) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "l"(p));
  } else if constexpr (kHint == LoadHint::kEvictFirst) {
    asm volatile("ld.global.cs.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p));
  } else if constexpr (kHint == LoadHint::kEvictFirstL2) {
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "l"(p), "l"(evict_first_policy()));
  } else {
    asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "l"(p));
  }
}

template <LoadHint kHint>
__device__ __forceinline__ void load8(uint32_t* w, const void* p) {
  if constexpr (kHint == LoadHint::kEvictFirst) {
    asm volatile("ld.global.cs.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
  } else {
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
  }
}

}  // namespace detail

// Read once: does not go through L1.
template <LoadHint kHint, int V, typename T>
__device__ __forceinline__ Vec<T, V> load_stream(const T* p) {
  Vec<T, V> v;
  if constexpr (Vec<T, V>::kBytes == 8) {
    detail::load8<kHint>(v.word, p);
  } else {
#pragma unroll
    for (int i = 0; i < Vec<T, V>::kBytes / 16; ++i) detail::load16<kHint>(v.word + 4 * i, p + i * (16 / sizeof(T)));
  }
  return v;
}

// Read by every row: stays in L1.
template <int V, typename T>
__device__ __forceinline__ Vec<T, V> load_cached(const T* p) {
  Vec<T, V> v;
  if constexpr (Vec<T, V>::kBytes == 8) {
    const uint2 r = *reinterpret_cast<const uint2*>(p);
    v.word[0] = r.x, v.word[1] = r.y;
  } else {
#pragma unroll
    for (int i = 0; i < Vec<T, V>::kBytes / 16; ++i) {
      const uint4 r = *reinterpret_cast<const uint4*>(p + i * (16 / sizeof(T)));
      v.word[4 * i] = r.x, v.word[4 * i + 1] = r.y, v.word[4 * i + 2] = r.z, v.word[4 * i + 3] = r.w;
    }
  }
  return v;
}

// As load_cached, and last to leave L1.
template <int V, typename T>
__device__ __forceinline__ Vec<T, V> load_kept(const T* p) {
  Vec<T, V> v;
  if constexpr (Vec<T, V>::kBytes == 8) {
    asm volatile("ld.global.L1::evict_last.v2.u32 {%0,%1}, [%2];" : "=r"(v.word[0]), "=r"(v.word[1]) : "l"(p));
  } else {
#pragma unroll
    for (int i = 0; i < Vec<T, V>::kBytes / 16; ++i) {
      asm volatile("ld.global.L1::evict_last.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v.word[4 * i]), "=r"(v.word[4 * i + 1]), "=r"(v.word[4 * i + 2]), "=r"(v.word[4 * i + 3])
                   : "l"(p + i * (16 / sizeof(T))));
    }
  }
  return v;
}

template <StoreHint kHint, int V, typename T>
__device__ __forceinline__ void store_vec(T* p, const Vec<T, V>& v) {
  if constexpr (Vec<T, V>::kBytes == 8) {
    const uint2 r = make_uint2(v.word[0], v.word[1]);
    if constexpr (kHint == StoreHint::kStream) __stcs(reinterpret_cast<uint2*>(p), r);
    else *reinterpret_cast<uint2*>(p) = r;
  } else {
#pragma unroll
    for (int i = 0; i < Vec<T, V>::kBytes / 16; ++i) {
      const uint4 r = make_uint4(v.word[4 * i], v.word[4 * i + 1], v.word[4 * i + 2], v.word[4 * i + 3]);
      uint4* q = reinterpret_cast<uint4*>(p + i * (16 / sizeof(T)));
      if constexpr (kHint == StoreHint::kStream) __stcs(q, r);
      else *q = r;
    }
  }
}

template <typename T, int V>
__device__ __forceinline__ Vec<T, V> zero_vec() {
  Vec<T, V> v;
#pragma unroll
  for (int i = 0; i < Vec<T, V>::kBytes / 4; ++i) v.word[i] = 0;
  return v;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  else return __float2bfloat16_rn(x);
}

template <typename T>
__device__ __forceinline__ float round_to(float x) {
  return to_float(from_float<T>(x));
}

template <typename T, int V>
__device__ __forceinline__ void unpack(const Vec<T, V>& v, float (&x)[V]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = __uint_as_float(v.word[i]);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // bfloat16 is the upper half of a float32
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      x[2 * i] = __uint_as_float(v.word[i] << 16);
      x[2 * i + 1] = __uint_as_float(v.word[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&v.word[i]));
      x[2 * i] = f.x, x[2 * i + 1] = f.y;
    }
  }
}

template <typename T, int V>
__device__ __forceinline__ Vec<T, V> pack(const float (&x)[V]) {
  Vec<T, V> v;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < V; ++i) v.word[i] = __float_as_uint(x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const __nv_bfloat162 h = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
        v.word[i] = *reinterpret_cast<const uint32_t*>(&h);
      } else {
        const __half2 h = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
        v.word[i] = *reinterpret_cast<const uint32_t*>(&h);
      }
    }
  }
  return v;
}

// Between two uses of a row: without it the compiler keeps the unpacked floats alive, twice the registers.
template <typename T, int V>
__device__ __forceinline__ void keep_packed(Vec<T, V>& v) {
#pragma unroll
  for (int i = 0; i < Vec<T, V>::kBytes / 4; ++i) asm("" : "+r"(v.word[i]));
}

// x rounded to T and back, two at a time.
template <typename T, int V>
__device__ __forceinline__ void round_all(float (&x)[V]) {
  if constexpr (sizeof(T) != 4) unpack(pack<T, V>(x), x);
}

}  // namespace lingbot::cuda
