// What every launcher needs on the host: the device's size, alignment checks, the type switch, and the launch itself.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../params.h"
#include "block.cuh"
#include "launch_config.h"

namespace lingbot::cuda {

struct DeviceInfo {
  int multiprocessors;
  int capability;  // 90 for 9.0
};

// Of the current device; asked once a device.
inline Status device_info(DeviceInfo* info) {
  constexpr int kDevices = 64;
  static std::atomic<uint32_t> known[kDevices];
  int device = 0;
  if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return cudaGetErrorString(e);
  uint32_t packed = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (packed == 0) {
    int count = 0, major = 0, minor = 0;
    cudaError_t e = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (e != cudaSuccess) return cudaGetErrorString(e);
    packed = static_cast<uint32_t>(count) << 16 | static_cast<uint32_t>(major * 10 + minor);
    if (device < kDevices) known[device].store(packed, std::memory_order_relaxed);
  }
  *info = {static_cast<int>(packed >> 16), static_cast<int>(packed & 0xffff)};
  return nullptr;
}

// Launches on `stream`. `overlap`: the grid's blocks may start while the previous grid of the stream drains (compute
// capability 9.0 and later; kernels begin with wait_for_previous_grid()).
template <typename... Params, typename... Args>
Status launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, bool overlap,
              Args&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  const cudaError_t e = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  if (e == cudaSuccess) return nullptr;
  (void)cudaGetLastError();  // reported here; this library's runtime is its own, so no one else's error is cleared
  return cudaGetErrorString(e);
}

// True where a vector of `bytes` can be read at every row of an operand (strides in elements of `element_size` bytes).
inline bool rows_aligned(const void* ptr, int64_t batch_stride, int64_t token_stride, int element_size, int bytes) {
  return reinterpret_cast<uintptr_t>(ptr) % bytes == 0 && batch_stride * element_size % bytes == 0 &&
         token_stride * element_size % bytes == 0;
}

inline bool aligned(const void* ptr, int bytes) { return reinterpret_cast<uintptr_t>(ptr) % bytes == 0; }

inline int element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>) for the C++ type of a dtype.
template <typename F>
Status with_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32: return f(TypeTag<float>{});
    case Dtype::kFloat16: return f(TypeTag<__half>{});
    case Dtype::kBFloat16: return f(TypeTag<__nv_bfloat16>{});
  }
  return "unknown dtype";
}

// Calls f(TypeTag<T>, TypeTag<R>) where the residual type R is T or float32.
template <typename F>
Status with_types(Dtype dtype, Dtype residual_dtype, F&& f) {
  return with_type(dtype, [&](auto t) -> Status {
    if (residual_dtype == dtype) return f(t, t);
    if (residual_dtype == Dtype::kFloat32) return f(t, TypeTag<float>{});
    return "residual dtype must be the compute dtype or float32";
  });
}

// How a row lies in a block's registers, known when compiled: kVecs vectors of V elements in each of kThreads threads
// (0: as many as the launch says, with bounds checks). V = 1: no vectors, the element-by-element kernel.
template <int kElements, int kVectors, int kRowThreads>
struct RowShape {
  static constexpr int V = kElements, kVecs = kVectors, kThreads = kRowThreads;

  // First element of vector i of this thread.
  static __device__ __forceinline__ int element(int i) { return row_element<V, kThreads>(i); }
};

// Elements of T, and of R beside it, that one vector holds: 16 bytes of the wider type.
template <typename T, typename R>
constexpr int kVectorElements = 16 / (sizeof(T) > sizeof(R) ? sizeof(T) : sizeof(R));

// Calls f(RowShape) for a configuration. The widths 5120, 3072 and 1536 are compiled exactly for bfloat16.
template <typename T, typename R, typename F>
Status with_row_shape(const RowConfig& config, F&& f) {
  constexpr int V = kVectorElements<T, R>;
  if (config.width == 1) return f(RowShape<1, 0, 0>{});
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (config.exact(160 * 8 / V, 4)) return f(RowShape<V, 4, 160 * 8 / V>{});
    if (config.exact(96 * 8 / V, 4)) return f(RowShape<V, 4, 96 * 8 / V>{});
    if constexpr (V == 8) {
      if (config.exact(320, 2)) return f(RowShape<V, 2, 320>{});
      if (config.exact(192, 2)) return f(RowShape<V, 2, 192>{});
      if (config.exact(96, 2)) return f(RowShape<V, 2, 96>{});
    } else {
      if (config.exact(96, 4)) return f(RowShape<V, 4, 96>{});
    }
  }
  switch (config.vectors) {
    case 1: return f(RowShape<V, 1, 0>{});
    case 2: return f(RowShape<V, 2, 0>{});
    case 4: return f(RowShape<V, 4, 0>{});
  }
  return "no kernel for this launch configuration";
}

constexpr int64_t kMaxGridX = 2147483647, kMaxGridYZ = 65535;

}  // namespace lingbot::cuda
