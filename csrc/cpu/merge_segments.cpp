// out = sum over segments of softmax(lse) * segment: attention over disjoint sets of keys into attention over all.
#include <cmath>

#include "dtype.h"
#include "parallel.h"

namespace lingbot::cpu::LINGBOT_ISA {
namespace {

constexpr int kMaxSegments = 64;

template <class T>
void merge_token(const MergeSegmentsParams& p, int64_t b, int64_t s) {
  const T* in = static_cast<const T*>(p.segments) + b * p.batch_stride + s * p.token_stride;
  T* out = static_cast<T*>(p.out) + (b * p.tokens + s) * p.heads * p.head_dim;
  const float* lse = p.lse + b * p.lse_batch_stride + s;
  for (int head = 0; head < p.heads; ++head) {
    float weight[kMaxSegments], largest = lse[head * p.lse_head_stride], sum = 0.0f;
    for (int n = 0; n < p.count; ++n) {
      weight[n] = lse[n * p.lse_segment_stride + head * p.lse_head_stride];
      if (weight[n] > largest) largest = weight[n];
    }
    for (int n = 0; n < p.count; ++n) sum += weight[n] = std::exp(weight[n] - largest);
    for (int n = 0; n < p.count; ++n) weight[n] /= sum;
    const int64_t first = int64_t{head} * p.head_dim;
    each_block(p.head_dim, [&](int i, int count) LINGBOT_LAMBDA {
      Lanes merged = load(in + first + i, count) * weight[0];
      for (int n = 1; n < p.count; ++n)
        merged = merged + load(in + n * p.segment_stride + first + i, count) * weight[n];
      store(out + first + i, merged, count);
    });
  }
}

}  // namespace

Status merge_segments(const MergeSegmentsParams& p, int threads) {
  if (p.batch <= 0 || p.tokens <= 0) return nullptr;
  if (p.count < 1 || p.count > kMaxSegments) return "count must be from 1 to 64";
  if (p.heads < 1 || p.head_dim < 1) return "heads and head_dim must be at least 1";
  if (p.segments == nullptr || p.lse == nullptr || p.out == nullptr) return "segments, lse and out must not be null";
  return with_dtype(p.dtype, [&](auto t) -> Status {
    using T = decltype(t);
    const int64_t bytes = sizeof(T) * (p.count + 1) * p.heads * p.head_dim;
    parallel_for(p.batch * p.tokens, bytes, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) merge_token<T>(p, i / p.tokens, i % p.tokens);
    });
    return nullptr;
  });
}

}  // namespace lingbot::cpu::LINGBOT_ISA
