// RMSNorm over a whole row, then RoPE on the pairs (2i, 2i + 1) of each head: what the K/V write and the pack share.
#pragma once

#include "dtype.h"

namespace lingbot::cpu::LINGBOT_ISA {
namespace {

constexpr int kRopeSegment = 256;  // channels of a head whose table is spread at a time

struct Rope {
  const float* cos_sin;  // [head_dim] of this token: cos | sin
  int heads, head_dim;
};

template <class T, class Out = T>
struct NormRopeRow {
  const T* x;
  const T* weight;
  Out* out;  // head h at out + h / heads_per_group * group_stride + h % heads_per_group * head_dim
  int64_t group_stride;
  int heads_per_group;
  const int64_t* groups = nullptr;  // where given, the groups' addresses; out is then an offset from each
  int64_t offset = 0;

  LINGBOT_INLINE Out* head(int h, int head_dim) const {
    Out* group = groups ? reinterpret_cast<Out*>(groups[h / heads_per_group]) + offset
                        : out + h / heads_per_group * group_stride;
    return group + int64_t{h % heads_per_group} * head_dim;
  }
};

template <class T>
LINGBOT_INLINE const T* row(const Rows& rows, int64_t batch, int64_t token) {
  return static_cast<const T*>(rows.ptr) + batch * rows.batch_stride + token * rows.token_stride;
}

template <class T>
LINGBOT_INLINE float inverse_rms(const T* x, int n, float eps) {
  const double squares = sum_blocks(n, [&](int i, int count) LINGBOT_LAMBDA {
    const Lanes v = load(x + i, count);
    return v * v;
  });
  return 1.0f / __builtin_sqrtf(static_cast<float>(squares / n) + eps);
}

// T(T(x * inverse_rms) * weight)
template <class T>
LINGBOT_INLINE Lanes normalise(const T* x, const T* weight, float inverse, int count) {
  return round_to<T>(round_to<T>(load(x, count) * inverse) * load(weight, count));
}

// A float32 as the sum of one that has 12 bits and of the rest: a product of the first with a half-precision value is
// exact.
struct Split {
  float high, low;
};

LINGBOT_INLINE Split split(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  bits &= 0xFFFFF000u;
  float high;
  __builtin_memcpy(&high, &bits, sizeof(high));
  return {high, x - high};
}

// Rotates `rows` (1 or 2 of them) of one token. With the table split in two a float32 rotation of half-precision values
// is as exact as one in float64 but for a millionth of its roundings; with three plain roundings it is ten times that.
template <class T, class Out>
LINGBOT_INLINE void norm_rope(const NormRopeRow<T, Out>* rows, int num_rows, const Rope& rope, float eps) {
  float inverse[2];
  for (int r = 0; r < num_rows; ++r) inverse[r] = inverse_rms(rows[r].x, rope.heads * rope.head_dim, eps);
  float cosine[2][kRopeSegment], sine[2][kRopeSegment];  // cos_i twice; -sin_i, sin_i; high parts, then low ones
  for (int first = 0; first < rope.head_dim; first += kRopeSegment) {
    const int rest = rope.head_dim - first;
    const int width = rest < kRopeSegment ? rest : kRopeSegment;
    const float* c = rope.cos_sin + first / 2;
    const float* s = c + rope.head_dim / 2;
    for (int i = 0; i < width / 2; ++i) {
      const Split cos = split(c[i]), sin = split(s[i]);
      cosine[0][2 * i] = cosine[0][2 * i + 1] = cos.high;
      cosine[1][2 * i] = cosine[1][2 * i + 1] = cos.low;
      sine[0][2 * i] = -(sine[0][2 * i + 1] = sin.high);
      sine[1][2 * i] = -(sine[1][2 * i + 1] = sin.low);
    }
    for (int r = 0; r < num_rows; ++r) {
      const NormRopeRow<T, Out>& row = rows[r];
      for (int head = 0; head < rope.heads; ++head) {
        const int64_t channel = int64_t{head} * rope.head_dim + first;
        const T* x = row.x + channel;
        const T* weight = row.weight + channel;
        Out* out = row.head(head, rope.head_dim) + first;
        each_block(width, [&](int i, int count) LINGBOT_LAMBDA {
          const Lanes v = normalise(x + i, weight + i, inverse[r], count);
          const Lanes w = swap_pairs(v);
          const Lanes high = v * load(cosine[0] + i, count) + w * load(sine[0] + i, count);
          const Lanes low = v * load(cosine[1] + i, count) + w * load(sine[1] + i, count);
          store(out + i, high + low, count);
        });
      }
    }
  }
}

inline Status check_heads(int heads, int head_dim) {
  if (heads < 1) return "heads must be at least 1";
  if (head_dim < 2 || head_dim % 2 != 0) return "head_dim must be even and at least 2";
  return nullptr;
}

}  // namespace
}  // namespace lingbot::cpu::LINGBOT_ISA
