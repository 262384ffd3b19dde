// The RoPE table of a run of tokens. Angles are float64 products, each distinct (axis, position) is computed once, and
// rows are put together from those: scalar libm code, so one instruction set is enough.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../params.h"
#include "parallel.h"

namespace lingbot::cpu {
namespace {

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && a < 0); }

// cos and sin of positions [first, first + count) for one axis, theta^(-2i / dim) its frequencies.
struct Axis {
  int pairs;
  int64_t first;
  std::vector<float> cosine, sine;  // [count, pairs]

  Axis(int dim, double theta, int64_t first, int64_t count, int threads)
      : pairs(dim / 2), first(first), cosine(count * pairs), sine(count * pairs) {
    std::vector<double> frequency(pairs);
    for (int i = 0; i < pairs; ++i) frequency[i] = std::pow(theta, -(2.0 * i) / dim);
    parallel_for(count, int64_t{pairs} * 512, threads, [&](int64_t begin, int64_t end) {  // 512 bytes take about 50 ns
      for (int64_t n = begin; n < end; ++n) {
        for (int i = 0; i < pairs; ++i) {
          const double angle = static_cast<double>(first + n) * frequency[i];
          cosine[n * pairs + i] = static_cast<float>(std::cos(angle));
          sine[n * pairs + i] = static_cast<float>(std::sin(angle));
        }
      }
    });
  }

  void put(int64_t position, float* cos_out, float* sin_out) const {
    const int64_t at = (position - first) * pairs;
    for (int i = 0; i < pairs; ++i) {
      cos_out[i] = cosine[at + i];
      sin_out[i] = sine[at + i];
    }
  }
};

}  // namespace

Status rope_cos_sin(const RopeCosSinParams& p, int threads) {
  if (p.num_tokens <= 0) return nullptr;
  if (p.out == nullptr) return "out must not be null";
  if (p.head_dim < 2 || p.head_dim % 2 != 0) return "head_dim must be even and at least 2";
  if (p.width < 1 || p.frame_stride < 1) return "frame_stride and width must be at least 1";
  if (!(p.theta > 0.0)) return "theta must be positive";
  if (p.token_start > std::numeric_limits<int64_t>::max() - p.num_tokens) return "token_start + num_tokens overflows";

  const int64_t last = p.token_start + p.num_tokens - 1;
  const int64_t t0 = floor_div(p.token_start, p.frame_stride), t1 = floor_div(last, p.frame_stride);
  const int64_t in_frame0 = p.token_start - t0 * p.frame_stride, in_frame1 = last - t1 * p.frame_stride;
  // Rows and columns that occur: all of them once the run leaves its first frame, or its first row.
  const bool one_frame = t0 == t1;
  const int64_t h0 = one_frame ? in_frame0 / p.width : 0;
  const int64_t h1 = one_frame ? in_frame1 / p.width : (p.frame_stride - 1) / p.width;
  const bool one_row = one_frame && h0 == h1;
  const int64_t w0 = one_row ? in_frame0 % p.width : 0;
  const int64_t w1 = one_row ? in_frame1 % p.width : std::min(p.width, p.frame_stride) - 1;

  const int side = 2 * (p.head_dim / 6);  // channels of the height and of the width axis
  const Axis t(p.head_dim - 2 * side, p.theta, t0, t1 - t0 + 1, threads);
  const Axis h(side, p.theta, h0, h1 - h0 + 1, threads);
  const Axis w(side, p.theta, w0, w1 - w0 + 1, threads);
  parallel_for(p.num_tokens, p.head_dim * sizeof(float), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = p.token_start + i;
      const int64_t frame = floor_div(n, p.frame_stride), in_frame = n - frame * p.frame_stride;
      float* cosine = p.out + i * p.head_dim;
      float* sine = cosine + p.head_dim / 2;
      t.put(frame, cosine, sine);
      h.put(in_frame / p.width, cosine + t.pairs, sine + t.pairs);
      w.put(in_frame % p.width, cosine + t.pairs + h.pairs, sine + t.pairs + h.pairs);
    }
  });
  return nullptr;
}

}  // namespace lingbot::cpu
