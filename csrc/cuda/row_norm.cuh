// What the norms over a row share: statistics of a row held in registers, modulation vectors, and the limits of a
// launch.
#pragma once

#include <utility>

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

// f(i, e) for each vector of this thread that lies in a row: vector i holds the elements from e on.
template <typename Shape, typename F>
__device__ __forceinline__ void for_each_vector(uint32_t dim, F&& f) {
#pragma unroll
  for (int i = 0; i < Shape::kVecs; ++i) {
    const int e = Shape::element(i);
    if (in_row<Shape::kThreads>(e, dim)) f(i, e);
  }
}

// This thread's vectors of the row at `row`; zeros beyond its end, and all of them where the row is not there.
template <LoadHint kLoad, typename Shape, typename T, int kVecs>
__device__ __forceinline__ void load_row(const T* row, bool there, uint32_t dim, Vec<T, Shape::V> (&x)[kVecs]) {
  static_assert(kVecs == Shape::kVecs, "a row of this shape");
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int e = Shape::element(i);
    x[i] = there && in_row<Shape::kThreads>(e, dim) ? load_stream<kLoad, Shape::V>(row + e) : zero_vec<T, Shape::V>();
  }
}

// The rows of a block: Plan::kRows tokens of one batch row, of contiguous [batch, tokens, dim] operands.
template <typename Shape, typename Plan>
struct BlockRows {
  static constexpr int V = Shape::V, kVecs = Shape::kVecs, kRows = Plan::kRows;
  const uint32_t tokens, dim, batch, token;
  const int64_t start;

  __device__ __forceinline__ BlockRows(uint32_t all_tokens, uint32_t row_dim)
      : tokens(all_tokens),
        dim(row_dim),
        batch(blockIdx.y),
        token(blockIdx.x * kRows),
        start((static_cast<int64_t>(batch) * tokens + token) * dim) {}

  // Of row n, among all of the operand's.
  __device__ __forceinline__ int64_t index(int n) const { return static_cast<int64_t>(batch) * tokens + token + n; }
  __device__ __forceinline__ bool has(int n) const { return kRows == 1 || token + n < tokens; }
  __device__ __forceinline__ int64_t row(int n) const { return start + static_cast<int64_t>(n) * dim; }

  template <typename T>
  __device__ __forceinline__ void load(const void* from, Vec<T, V> (&x)[kRows][kVecs]) const {
#pragma unroll
    for (int n = 0; n < kRows; ++n)
      load_row<Plan::kLoad, Shape>(static_cast<const T*>(from) + row(n), has(n), dim, x[n]);
  }

  // Rounds V elements of row n from e on to T, stores them and returns what was stored.
  template <typename T>
  __device__ __forceinline__ Vec<T, V> store(void* to, int n, int e, const float (&value)[V]) const {
    const Vec<T, V> v = pack<T, V>(value);
    store_vec<Plan::kStore>(static_cast<T*>(to) + row(n) + e, v);
    return v;
  }

  // f(n) for each row that is there.
  template <typename F>
  __device__ __forceinline__ void for_each_row(F&& f) const {
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      if (!has(n)) break;
      f(n);
    }
  }
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
template <Statistics kStatistics, typename Shape, typename R, int V, int kVecs, int kRows>
__device__ __forceinline__ void row_moments(Vec<R, V> (&x)[kRows][kVecs], uint32_t dim, float inv_dim, float eps,
                                            float (&shared)[2][kRows][kMaxWarps], RowMoments (&moments)[kRows]) {
  constexpr bool kMerged = kStatistics == Statistics::kMerged && Shape::kThreads != 0;
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
      if (!in_row<Shape::kThreads>(Shape::element(i), dim)) continue;
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

// Channel vectors that all rows of a block share, `read(e)` giving those of the V elements from e on. With
// ChannelLoad::kAhead they are read by ahead() and kept, else where they are used.
template <typename Shape, typename Plan, typename Read>
struct SharedChannels {
  static constexpr bool kAhead = Plan::kChannelLoad == ChannelLoad::kAhead;
  using Value = decltype(std::declval<Read>()(0));
  const Read read;
  const uint32_t dim;
  Value kept[kAhead ? Shape::kVecs : 1];

  __device__ __forceinline__ void ahead() {
    if constexpr (kAhead) for_each_vector<Shape>(dim, [&](int i, int e) { kept[i] = read(e); });
  }

  __device__ __forceinline__ Value at(int i, int e) const {
    if constexpr (kAhead) return kept[i];
    else return read(e);
  }
};

template <typename Shape, typename Plan, typename Read>
__device__ __forceinline__ SharedChannels<Shape, Plan, Read> shared_channels(uint32_t dim, const Read& read) {
  return {read, dim, {}};
}

template <int V>
struct GateVec {
  float value[V];
};

// The gate of one batch row; where there is none, 1.
template <typename Shape, typename Plan>
__device__ __forceinline__ auto gate_channels(const Modulation& gate, uint32_t batch, uint32_t dim) {
  return shared_channels<Shape, Plan>(dim, [channels = batch_channels(gate, batch)](int e) {
    GateVec<Shape::V> v;
    load_modulation<Shape::V, Plan::kChannelLoad>(channels, e, 1.f, v.value);
    return v;
  });
}

// x + delta * gate
template <typename R, typename T, int V>
__device__ __forceinline__ void add_gated(const Vec<R, V>& x, const Vec<T, V>& delta, const GateVec<V>& gate,
                                          float (&sum)[V]) {
  float d[V];
  unpack(x, sum);
  unpack(delta, d);
#pragma unroll
  for (int j = 0; j < V; ++j) sum[j] = fmaf(d[j], gate.value[j], sum[j]);
}

// normalised * (1 + scale) + shift
template <int V>
struct ModulationVec {
  float scale[V], shift[V];

  __device__ __forceinline__ void affine(float (&weight)[V], float (&bias)[V]) const {
#pragma unroll
    for (int j = 0; j < V; ++j) weight[j] = 1.f + scale[j], bias[j] = shift[j];
  }
};

template <typename Shape, typename Plan>
__device__ __forceinline__ auto modulation_channels(const Modulation& scale, const Modulation& shift, uint32_t batch,
                                                    uint32_t dim) {
  return shared_channels<Shape, Plan>(
      dim, [gain = batch_channels(scale, batch), bias = batch_channels(shift, batch)](int e) {
        ModulationVec<Shape::V> v;
        load_modulation<Shape::V, Plan::kChannelLoad>(gain, e, 0.f, v.scale);
        load_modulation<Shape::V, Plan::kChannelLoad>(bias, e, 0.f, v.shift);
        return v;
      });
}

// normalised * weight + bias
template <typename T, int V>
struct AffineVec {
  Vec<T, V> packed_weight, packed_bias;

  __device__ __forceinline__ void affine(float (&weight)[V], float (&bias)[V]) const {
    unpack(packed_weight, weight);
    unpack(packed_bias, bias);
  }
};

template <typename T, typename Shape, typename Plan>
__device__ __forceinline__ auto affine_channels(const void* weight, const void* bias, uint32_t dim) {
  return shared_channels<Shape, Plan>(
      dim, [weight = static_cast<const T*>(weight), bias = static_cast<const T*>(bias)](int e) {
        return AffineVec<T, Shape::V>{load_channels<Plan::kChannelLoad, Shape::V>(weight + e),
                                      load_channels<Plan::kChannelLoad, Shape::V>(bias + e)};
      });
}

// V elements of a normalised row: (x - mean) * inv_std * weight + bias.
template <typename R, int V>
__device__ __forceinline__ void normalise(Vec<R, V>& x, const RowMoments& m, const float (&weight)[V],
                                          const float (&bias)[V], float (&y)[V]) {
  keep_packed(x);
  unpack(x, y);
#pragma unroll
  for (int j = 0; j < V; ++j) y[j] = fmaf((y[j] - m.mean) * m.inv_std, weight[j], bias[j]);
}

// The normalised rows of a block, rounded to T once.
template <typename T, typename Shape, typename Plan, typename R, int V, int kVecs, int kRows, typename Read>
__device__ __forceinline__ void store_normalised(const BlockRows<Shape, Plan>& rows, Vec<R, V> (&x)[kRows][kVecs],
                                                 const RowMoments (&moments)[kRows],
                                                 const SharedChannels<Shape, Plan, Read>& channels, void* y) {
  for_each_vector<Shape>(rows.dim, [&](int i, int e) {
    float weight[V], bias[V];
    channels.at(i, e).affine(weight, bias);
    rows.for_each_row([&](int n) {
      float f[V];
      normalise(x[n][i], moments[n], weight, bias, f);
      rows.template store<T>(y, n, e, f);
    });
  });
}

// value(e) for each element of a row, rounded to T once.
template <typename T, typename Value>
__device__ __forceinline__ void store_row_any(void* y, int64_t row, uint32_t dim, const Value& value) {
  T* out = static_cast<T*>(y) + row * dim;
  for (uint32_t e = threadIdx.x; e < dim; e += blockDim.x) out[e] = from_float<T>(value(e));
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
