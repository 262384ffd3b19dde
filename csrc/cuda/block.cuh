// What the threads of a row do together: sums, and the order against the grids before and after.
#pragma once

#include <cstdint>

namespace lingbot::cuda {

constexpr int kMaxWarps = 32;

// Programmatic dependent launch: where the launch allows it, this grid's blocks start while the previous grid drains.
// Nothing may be read or written before this returns.
__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void allow_next_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// First element of vector i of this thread. kThreads 0: the row's width is known at run time only, and vectors may lie
// beyond its end; else kThreads threads hold exactly one row.
template <int V, int kThreads>
__device__ __forceinline__ int row_element(int i) {  // signed: the compiler then folds i's part into the instruction
  return static_cast<int>(threadIdx.x) * V + i * (kThreads == 0 ? static_cast<int>(blockDim.x) : kThreads) * V;
}

template <int kThreads>
__device__ __forceinline__ bool in_row(int element, uint32_t dim) {
  return kThreads != 0 || element < static_cast<int>(dim);
}

template <int N>
__device__ __forceinline__ void warp_sum(float (&value)[N]) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
#pragma unroll
    for (int n = 0; n < N; ++n) value[n] += __shfl_xor_sync(0xffffffffu, value[n], offset);
  }
}

// Sums over threadIdx.x, the same bits in every thread; one barrier, none where a row is one warp. A second call needs
// other shared memory than the one before it, or a barrier in between.
template <int N>
__device__ __forceinline__ void row_sum(float (&value)[N], float (&shared)[N][kMaxWarps]) {
  warp_sum(value);
  if (blockDim.x == 32) return;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (lane == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) shared[n][warp] = value[n];
  }
  __syncthreads();
  const bool filled = lane < static_cast<int>(blockDim.x >> 5);
#pragma unroll
  for (int n = 0; n < N; ++n) value[n] = filled ? shared[n][lane] : 0.f;
  warp_sum(value);
}

}  // namespace lingbot::cuda
