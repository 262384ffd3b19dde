// What the tuning program measures with: device memory, random operands, poison, timing of rotated launches, copies of
// the same bytes, and comparison with a reference held in double.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/vec.cuh"

namespace tune {

using lingbot::Status;
using lingbot::cuda::from_float;
using lingbot::cuda::to_float;

inline void check(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(e));
  std::exit(1);
}

struct Options {
  std::string op, variant;
  std::vector<int> dims = {5120, 1536, 3072};
  std::vector<int> tokens = {4524, 1131, 2262, 4680};
  bool sweep = true, time = true;
  int sweep_every = 1;  // of the sweep's cases run every so-manieth
};

// One allocation, handed out from the front; reset between cases.
class Arena {
 public:
  explicit Arena(size_t bytes) : size_(bytes) { check(cudaMalloc(&base_, bytes), "cudaMalloc"); }
  ~Arena() { cudaFree(base_); }
  template <typename T>
  T* take(int64_t count) {
    const size_t at = (used_ + 255) / 256 * 256;
    used_ = at + count * sizeof(T);
    if (used_ > size_) {
      std::fprintf(stderr, "arena of %zu bytes is too small\n", size_);
      std::exit(1);
    }
    return reinterpret_cast<T*>(static_cast<char*>(base_) + at);
  }
  void reset() { used_ = 0; }
  void* base() const { return base_; }
  size_t size() const { return size_; }

 private:
  void* base_ = nullptr;
  size_t size_, used_ = 0;
};

__device__ __forceinline__ uint32_t hash(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16;
  return x;
}

// Sum of four uniforms: near normal, standard deviation `scale`.
template <typename T>
__global__ void fill_random(T* out, int64_t count, uint32_t seed, float mean, float scale) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const uint32_t a = hash(static_cast<uint32_t>(i) * 2654435761u + seed), b = hash(a + 0x9e3779b9u);
    const float sum = (a & 0xffff) + (a >> 16) + (b & 0xffff) + static_cast<float>(b >> 16);
    out[i] = from_float<T>(mean + scale * (sum / 65536.f - 2.f) * 1.7320508f);
  }
}

template <typename T>
void randomise(T* out, int64_t count, uint32_t seed, float mean = 0.f, float scale = 1.f) {
  fill_random<T><<<1024, 256>>>(out, count, seed, mean, scale);
  check(cudaGetLastError(), "fill_random");
}

constexpr int kPoison = 0xff;  // every element a NaN

struct Mismatch {
  unsigned long long wrong_bits;  // 16-bit elements unlike the rounded reference
  unsigned long long not_finite, touched;
  double worst[2];  // of |out - ref| / (|ref| + 1); 16-bit, float32
};

// out row r (slot map applied where given) against ref row r.
template <typename T>
__global__ void compare_rows(const T* out, int64_t row_stride, const int64_t* slot, const double* ref, int64_t rows,
                             int64_t dim, Mismatch* m) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < rows * dim;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t row = i / dim, e = i % dim;
    const float value = to_float(out[(slot ? slot[row] : row) * row_stride + e]);
    if (!isfinite(value)) {
      atomicAdd(&m->not_finite, 1ull);
      continue;
    }
    if (sizeof(T) == 2 && value != to_float(from_float<T>(static_cast<float>(ref[i])))) atomicAdd(&m->wrong_bits, 1ull);
    const double error = fabs(value - ref[i]) / (fabs(ref[i]) + 1.0);
    atomicMax(reinterpret_cast<unsigned long long*>(&m->worst[sizeof(T) == 4]),
              static_cast<unsigned long long>(__double_as_longlong(error)));
  }
}

// Rows that no slot names must still be poison.
static __global__ void count_touched(const unsigned char* cache, int64_t row_bytes, int64_t rows,
                                     const unsigned char* named, Mismatch* m) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < rows * row_bytes;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    if (!named[i / row_bytes] && cache[i] != kPoison) atomicAdd(&m->touched, 1ull);
  }
}

// Collects what several comparisons of one launch found.
class Gate {
 public:
  Gate() { check(cudaMalloc(&device_, sizeof(Mismatch)), "cudaMalloc"); }
  ~Gate() { cudaFree(device_); }
  void clear() { check(cudaMemset(device_, 0, sizeof(Mismatch)), "cudaMemset"), elements_ = 0, unequal_ = 0; }
  template <typename T>
  void rows(const T* out, int64_t row_stride, const int64_t* slot, const double* ref, int64_t rows, int64_t dim) {
    compare_rows<T><<<1024, 256>>>(out, row_stride, slot, ref, rows, dim, device_);
    if (sizeof(T) == 2) elements_ += rows * dim;
  }
  void untouched(const void* cache, int64_t row_bytes, int64_t rows, const unsigned char* named) {
    count_touched<<<1024, 256>>>(static_cast<const unsigned char*>(cache), row_bytes, rows, named, device_);
  }
  // Rows of a pure copy that the caller found unlike what they should be.
  void unequal(int64_t rows) { unequal_ += rows; }
  // True where all is finite, untouched slots kept their bits, 16-bit elements equal the rounded reference in all but
  // `share`, and float32 ones are within 2e-6.
  bool passed(double share = 3e-4) {
    check(cudaMemcpy(&last, device_, sizeof(Mismatch), cudaMemcpyDeviceToHost), "compare");
    const bool close = last.wrong_bits <= share * elements_ + 2 && last.worst[0] < 0.03 && last.worst[1] < 2e-6;
    return last.not_finite == 0 && last.touched == 0 && unequal_ == 0 && close;
  }
  double wrong_share() const { return elements_ ? static_cast<double>(last.wrong_bits) / elements_ : 0.0; }
  Mismatch last = {};

 private:
  Mismatch* device_ = nullptr;
  int64_t elements_ = 0, unequal_ = 0;
};

using Run = std::function<Status(int set, cudaStream_t stream)>;

struct Times {
  double graph_us = 0, single_us = 0;  // a launch of a replayed graph; a launch between two events
};

inline double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

// Rotates over `sets` operand sets, so that the L2 holds none of them when its turn comes.
inline Status time_run(const Run& run, int sets, cudaStream_t stream, Times* times) {
  const int launches = std::max(sets, 12 / sets * sets);
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  for (int i = 0; i < 2; ++i) {
    if (Status s = run(i % sets, stream)) return s;
  }
  check(cudaStreamSynchronize(stream), "warm-up");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < launches; ++i) {
    if (Status s = run(i % sets, stream)) {
      std::fprintf(stderr, "while capturing: %s\n", s);
      std::exit(1);
    }
  }
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  check(cudaStreamEndCapture(stream, &graph), "end capture");
  check(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  std::vector<double> replay, single;
  for (int i = 0; i < 12; ++i) {
    check(cudaEventRecord(begin, stream), "record");
    check(cudaGraphLaunch(exec, stream), "replay");
    check(cudaEventRecord(end, stream), "record");
    check(cudaStreamSynchronize(stream), "replay");
    float ms;
    check(cudaEventElapsedTime(&ms, begin, end), "elapsed");
    if (i >= 2) replay.push_back(ms * 1e3 / launches);
  }
  for (int i = 0; i < 24; ++i) {
    check(cudaEventRecord(begin, stream), "record");
    if (Status s = run(i % sets, stream)) return s;
    check(cudaEventRecord(end, stream), "record");
    check(cudaStreamSynchronize(stream), "launch");
    float ms;
    check(cudaEventElapsedTime(&ms, begin, end), "elapsed");
    single.push_back(ms * 1e3);
  }
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  *times = {median(replay), median(single)};
  return nullptr;
}

__global__ void __launch_bounds__(256)
    copy_vectors(const uint4* __restrict__ in, uint4* __restrict__ out, int64_t count) {
  const int64_t first = blockIdx.x * int64_t{1024} + threadIdx.x;
  uint4 v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + i * 256 < count) v[i] = __ldcs(in + first + i * 256);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + i * 256 < count) out[first + i * 256] = v[i];
  }
}

struct CopyTimes {
  Times memcpy, kernel;
};

// Copies that move `bytes` in all (half read, half written), rotated over the arena; timed once a size.
inline CopyTimes copy_times(Arena& arena, int64_t bytes, cudaStream_t stream) {
  static std::map<int64_t, CopyTimes> known;
  if (auto at = known.find(bytes); at != known.end()) return at->second;
  const int64_t half = bytes / 2 / 256 * 256;
  const int sets = static_cast<int>(std::clamp<int64_t>(400'000'000 / bytes + 1, 3, 12));
  char* base = static_cast<char*>(arena.base());
  randomise(reinterpret_cast<__nv_bfloat16*>(base), half * sets / 2, 7u);
  char* to = base + half * sets;
  CopyTimes t;
  const Run by_engine = [=](int set, cudaStream_t s) -> Status {
    const cudaError_t e = cudaMemcpyAsync(to + set * half, base + set * half, half, cudaMemcpyDeviceToDevice, s);
    return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
  };
  const Run by_kernel = [=](int set, cudaStream_t s) -> Status {
    copy_vectors<<<static_cast<unsigned>((half / 16 + 1023) / 1024), 256, 0, s>>>(
        reinterpret_cast<const uint4*>(base + set * half), reinterpret_cast<uint4*>(to + set * half), half / 16);
    const cudaError_t e = cudaGetLastError();
    return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
  };
  if (Status s = time_run(by_engine, sets, stream, &t.memcpy)) std::fprintf(stderr, "copy: %s\n", s);
  if (Status s = time_run(by_kernel, sets, stream, &t.kernel)) std::fprintf(stderr, "copy: %s\n", s);
  return known[bytes] = t;
}

}  // namespace tune
