// What the norms over a row share: statistics of a row held in registers, modulation vectors, and the limits of a
// launch.
#pragma once

#include "block.cuh"
#include "launch.cuh"
#include "vec.cuh"

namespace lingbot::cuda {

struct RowMoments {
  float mean, inv_std;
};

// How a block gets the mean and the variance of its rows. Both see every deviation from a mean, so neither cancels.
enum class Statistics {
  kTwoPass,  // the sum, then the squares around the mean: two barriers
  kMerged,   // squares around each thread's own mean, merged pair by pair (Chan, Golub, LeVeque 1979): one barrier
};

// When modulation and affine vectors are read, which every row shares.
enum class ChannelLoad {
  kLate,   // where they are used: fewest registers
  kKept,   // the same, last to leave L1
  kAhead,  // with the row, before the reduction
};

// What a row kernel is compiled with besides its shape. kRows: rows of one batch that a block has in flight together,
// sharing barriers and channel vectors.
template <int kBlocks = 1, int kRowsOfBlock = 1, ChannelLoad kChannels = ChannelLoad::kLate,
          Statistics kMoments = Statistics::kTwoPass, LoadHint kLoadHint = LoadHint::kNoAllocate,
          StoreHint kStoreHint = StoreHint::kWriteBack>
struct RowPlan {
  static constexpr int kMinBlocks = kBlocks, kRows = kRowsOfBlock;
  static constexpr ChannelLoad kChannelLoad = kChannels;
  static constexpr Statistics kStatistics = kMoments;
  static constexpr LoadHint kLoad = kLoadHint;
  static constexpr StoreHint kStore = kStoreHint;
};

// Sum and squares around the mean of one thread's `count` elements become those of all blockDim.x threads'; `shared`
// holds a mean and a square of each warp.
template <int kRows>
__device__ __forceinline__ void merge_moments(float (&mean)[kRows], float (&squares)[kRows], float count,
                                              float (&shared)[2][kRows][kMaxWarps]) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      const float other = __shfl_xor_sync(0xffffffffu, mean[n], offset), apart = other - mean[n];
      squares[n] += __shfl_xor_sync(0xffffffffu, squares[n], offset);
      squares[n] = fmaf(apart * apart, 0.5f * count, squares[n]);
      mean[n] = 0.5f * (mean[n] + other);
    }
    count *= 2.f;
  }
  if (blockDim.x == 32) return;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = static_cast<int>(blockDim.x >> 5);
  if (lane == 0) {
#pragma unroll
    for (int n = 0; n < kRows; ++n) shared[0][n][warp] = mean[n], shared[1][n][warp] = squares[n];
  }
  __syncthreads();
  float of_warp[kRows];
#pragma unroll
  for (int n = 0; n < kRows; ++n) mean[n] = of_warp[n] = lane < warps ? shared[0][n][lane] : 0.f;
  warp_sum(mean);
#pragma unroll
  for (int n = 0; n < kRows; ++n) {
    mean[n] *= 1.f / static_cast<float>(warps);
    const float apart = of_warp[n] - mean[n];
    squares[n] = lane < warps ? fmaf(apart * apart, count, shared[1][n][lane]) : 0.f;
  }
  warp_sum(squares);
}

// Mean and variance of rows in registers. One call uses `shared` once: a block that calls it in a loop needs two
// barriers a call (Statistics::kTwoPass), or other shared memory every other time.
template <Statistics kStatistics, int kThreads, typename R, int V, int kVecs, int kRows>
__device__ __forceinline__ void row_moments(Vec<R, V> (&x)[kRows][kVecs], uint32_t dim, float inv_dim, float eps,
                                            float (&shared)[2][kRows][kMaxWarps], RowMoments (&moments)[kRows]) {
  constexpr bool kMerged = kStatistics == Statistics::kMerged && kThreads != 0;
  float mean[kRows], squares[kRows];
#pragma unroll
  for (int n = 0; n < kRows; ++n) {
    mean[n] = 0.f;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {  // vectors beyond the row are zero
      float f[V], part = 0.f;
      unpack(x[n][i], f);
#pragma unroll
      for (int j = 0; j < V; ++j) part += f[j];
      mean[n] += part;
    }
  }
  if constexpr (!kMerged) row_sum(mean, shared[0]);
#pragma unroll
  for (int n = 0; n < kRows; ++n) {
    mean[n] *= kMerged ? 1.f / (kVecs * V) : inv_dim;
    squares[n] = 0.f;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      if (!in_row<kThreads>(row_element<V, kThreads>(i), dim)) continue;
      float f[V], part = 0.f;
      keep_packed(x[n][i]);
      unpack(x[n][i], f);
#pragma unroll
      for (int j = 0; j < V; ++j) part = fmaf(f[j] - mean[n], f[j] - mean[n], part);
      squares[n] += part;
    }
  }
  if constexpr (kMerged) merge_moments(mean, squares, static_cast<float>(kVecs * V), shared);
  else row_sum(squares, shared[1]);
#pragma unroll
  for (int n = 0; n < kRows; ++n) moments[n] = {mean[n], rsqrtf(squares[n] * inv_dim + eps)};
}

// The same of a row in memory, read twice, element by element.
template <typename R>
__device__ RowMoments row_moments_any(const R* row, uint32_t dim, float inv_dim, float eps,
                                      float (&shared)[2][1][kMaxWarps]) {
  float sum[1] = {0.f};
  for (uint32_t e = threadIdx.x; e < dim; e += blockDim.x) sum[0] += to_float(row[e]);
  row_sum(sum, shared[0]);
  const float mean = sum[0] * inv_dim;
  sum[0] = 0.f;
  for (uint32_t e = threadIdx.x; e < dim; e += blockDim.x) {
    const float d = to_float(row[e]) - mean;
    sum[0] = fmaf(d, d, sum[0]);
  }
  row_sum(sum, shared[1]);
  return {mean, rsqrtf(sum[0] * inv_dim + eps)};
}

// V elements of a vector that every row shares.
template <ChannelLoad kLoad, int V, typename T>
__device__ __forceinline__ Vec<T, V> load_channels(const T* p) {
  if constexpr (kLoad == ChannelLoad::kKept) return load_kept<V>(p);
  else return load_cached<V>(p);
}

// V elements of a per-channel float32 vector; `absent` where there is none.
template <int V, ChannelLoad kLoad = ChannelLoad::kLate>
__device__ __forceinline__ void load_modulation(const float* channels, int e, float absent, float (&value)[V]) {
  if (channels) {
    unpack(load_channels<kLoad, V>(channels + e), value);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) value[i] = absent;
  }
}

__device__ __forceinline__ float modulation_at(const float* channels, uint32_t e, float absent) {
  return channels ? channels[e] : absent;
}

// A modulation vector of one batch row.
__device__ __forceinline__ const float* batch_channels(const Modulation& m, uint32_t batch) {
  return m.ptr ? m.ptr + batch * m.batch_stride : nullptr;
}

inline bool modulation_aligned(const Modulation& m) { return aligned(m.ptr, 16) && m.batch_stride % 4 == 0; }

inline Status row_shape_problem(int64_t batch, int64_t tokens, int32_t dim) {
  if (dim < 1 || dim > 1 << 24) return "dim must be in [1, 2^24]";
  if (batch < 0 || batch > kMaxGridYZ) return "batch must be in [0, 65535]";
  if (tokens < 0 || tokens > kMaxGridX) return "tokens must be in [0, 2^31)";
  return nullptr;
}

// Elements of a vector where all of a launch's operands are aligned and the row is made of whole vectors; else 1.
inline int row_width(bool all_aligned, int32_t dim, Dtype dtype, Dtype residual_dtype) {
  const int width =
      16 / (element_size(dtype) > element_size(residual_dtype) ? element_size(dtype) : element_size(residual_dtype));
  return all_aligned && dim % width == 0 ? width : 1;
}

}  // namespace lingbot::cuda
