// Slow references in double, one element a thread, that the tuned kernels are compared with. They round where the
// definition of an op rounds, and nowhere else.
#pragma once

#include "../../csrc/cuda/block.cuh"
#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/vec.cuh"

namespace tune {

using lingbot::cuda::from_float;
using lingbot::cuda::round_to;
using lingbot::cuda::to_float;

struct Moments {
  double mean, square;  // of x; of x^2 (about zero), or of (x - mean)^2
};

// One block a row of `dim` doubles-to-be.
template <typename T, bool kCentred>
__global__ void reference_moments(const T* x, int64_t batch_stride, int64_t token_stride, int64_t tokens, int64_t dim,
                                  Moments* out) {
  __shared__ double shared[256];
  const int64_t row = blockIdx.x;
  const T* in = x + row / tokens * batch_stride + row % tokens * token_stride;
  const auto block_sum = [&](double value) {
    __syncthreads();
    shared[threadIdx.x] = value;
    __syncthreads();
    for (int n = 128; n > 0; n /= 2) {
      if (threadIdx.x < n) shared[threadIdx.x] += shared[threadIdx.x + n];
      __syncthreads();
    }
    return shared[0];
  };
  double sum = 0;
  for (int64_t e = threadIdx.x; e < dim; e += 256) sum += to_float(in[e]);
  const double mean = block_sum(sum) / dim, centre = kCentred ? mean : 0.0;
  sum = 0;
  for (int64_t e = threadIdx.x; e < dim; e += 256) sum += (to_float(in[e]) - centre) * (to_float(in[e]) - centre);
  const double square = block_sum(sum) / dim;
  if (threadIdx.x == 0) out[row] = {mean, square};
}

// T(T(x * inv_rms) * weight), then rotated where there are angles; ref [batch * tokens, dim].
template <typename T>
__global__ void reference_norm_rope(const T* x, int64_t batch_stride, int64_t token_stride, int64_t tokens, int64_t dim,
                                    const Moments* m, double eps, const T* weight, const float* cos_sin,
                                    int64_t head_dim, int64_t rows, double* ref) {
  const auto normed = [&](const T* in, int64_t row, int64_t e) {
    const double n = round_to<T>(static_cast<float>(to_float(in[e]) / sqrt(m[row].square + eps)));
    return static_cast<double>(round_to<T>(static_cast<float>(n * to_float(weight[e]))));
  };
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < rows * dim;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t row = i / dim, e = i % dim, token = row % tokens;
    const T* in = x + row / tokens * batch_stride + token * token_stride;
    if (!weight) {
      ref[i] = to_float(in[e]);
    } else if (!cos_sin) {
      ref[i] = normed(in, row, e);
    } else {
      const int64_t pair = e % head_dim / 2;
      const double cos = cos_sin[token * head_dim + pair], sin = cos_sin[token * head_dim + head_dim / 2 + pair];
      const double a = normed(in, row, e / 2 * 2), b = normed(in, row, e / 2 * 2 + 1);
      ref[i] = e % 2 ? a * sin + b * cos : a * cos - b * sin;
    }
  }
}

// x_out as R, and as double for the comparison. Absent operands are null.
template <typename T, typename R>
__global__ void reference_residual(const R* x, const T* delta, const float* gate, const T* cam_scale,
                                   const T* cam_shift, int64_t rows, int64_t dim, R* x_out, double* ref) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < rows * dim;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    double value = to_float(x[i]);
    if (delta) value += static_cast<double>(to_float(delta[i])) * (gate ? gate[i % dim] : 1.f);
    if (cam_scale) value = (1.0 + to_float(cam_scale[i])) * value + to_float(cam_shift[i]);
    ref[i] = value;
    x_out[i] = from_float<R>(static_cast<float>(value));
  }
}

// layer_norm(x) * (1 + scale) + shift, or * weight + bias.
template <typename T, typename R>
__global__ void reference_layer_norm(const R* x, const Moments* m, double eps, const float* scale, const float* shift,
                                     const T* weight, const T* bias, int64_t rows, int64_t dim, double* ref) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < rows * dim;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t row = i / dim, e = i % dim;
    const double n = (to_float(x[i]) - m[row].mean) / sqrt(m[row].square + eps);
    ref[i] = weight ? n * to_float(weight[e]) + to_float(bias[e]) : n * (1.0 + scale[e]) + shift[e];
  }
}

// `width` columns of a matrix of doubles, made contiguous.
static __global__ void gather_rows(const double* in, int64_t row_stride, int64_t rows, int64_t width, double* out) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < rows * width;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    out[i] = in[i / width * row_stride + i % width];
  }
}

}  // namespace tune
