// Attention with int8 Q K^T and bfloat16 P V on Hopper: one kernel, persistent, one block a multiprocessor.
//
// A producer warpgroup brings keys and values tile by tile; each of three consumer warpgroups owns 64 queries of a
// head. Scores are exact int32 sums; x = score * k_scale * q_scale * softmax_scale * log2(e), p = 2^(x - reference) and
// out = sum p v / sum p.
//
// A row's reference is the maximum of its first tile of keys. It is not raised with every tile: p is stored as
// bfloat16, which has float's exponents, so that a reference within a factor of 2^100 of the maximum serves as well.
// Only when a row's sum grows beyond kSumLimit is the tile taken again with its own maximum. So a tile needs no
// maximum, no exchange between threads, and no rescaling of the output.
//
// What the exponentials take is near what the products take, and both draw on the registers: the groups take turns at
// the tensor cores, so that one multiplies while two exponentiate.
#pragma once

#include "int8_attention_work.cuh"

namespace lingbot::cuda {

constexpr float kSumLimit = 1.8446744e19f;  // 2^64; leaves 2^64 for the values

// A consumer thread's two rows of 64: 16 * warp + lane / 4, and that plus 8.
struct AttentionRows {
  uint32_t q;      // where the group's queries lie
  uint32_t zero;   // what the compiler doesn't know to be 0
  float scale[2];  // q_scale * score_scale
  float reference[2], sum[2];
};

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float4 load_scales(uint32_t scales, int pair) {
  float4 s;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(s.x), "=f"(s.y), "=f"(s.z), "=f"(s.w)
               : "r"(scales + pair * 64));
  return s;
}

// Calls f(index of the element, row 0 or 1, column within the tile without the thread's own, score, k_scale).
template <class C, class F>
__device__ __forceinline__ void for_each_score(const uint32_t (&s)[C::kKeys / 2], uint32_t scales, F&& f) {
#pragma unroll
  for (int pair = 0; pair < C::kKeys / 16; ++pair) {
    const float4 four = load_scales(scales, pair);
    const float k_scale[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int i = pair * 8 + (n >> 1) * 4 + row * 2 + (n & 1);
        f(i, row, pair * 16 + (n >> 1) * 8 + (n & 1), __int2float_rn(static_cast<int>(s[i])), k_scale[n]);
      }
    }
  }
}

// Scores to exponentials against the tile's own maximum; `shrink` is what earlier sums and outputs are multiplied by.
// kEdge: keys from `visible` on are not there, and the one before them has the bias.
template <class C, bool kEdge>
__device__ __forceinline__ void exponentials_of_maximum(uint32_t (&s)[C::kKeys / 2], uint32_t scales,
                                                        AttentionRows& rows, float (&shrink)[2], int visible,
                                                        float last_key_bias) {
  float largest[2] = {rows.reference[0], rows.reference[1]};
  for_each_score<C>(s, scales, [&](int i, int row, int column, float score, float k_scale) {
    float x = score * k_scale * rows.scale[row];
    if (kEdge) {
      column += 2 * (threadIdx.x & 3);
      x += column == visible - 1 ? last_key_bias : 0.f;
      if (column >= visible) x = -INFINITY;
    }
    s[i] = __float_as_uint(x);
    largest[row] = fmaxf(largest[row], x);
  });
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    largest[row] = fmaxf(largest[row], __shfl_xor_sync(0xffffffffu, largest[row], 1));
    largest[row] = fmaxf(largest[row], __shfl_xor_sync(0xffffffffu, largest[row], 2));
    shrink[row] = exp2_fast(rows.reference[row] - largest[row]);
    rows.reference[row] = largest[row];
    rows.sum[row] *= shrink[row];
  }
#pragma unroll
  for (int i = 0; i < C::kKeys / 2; ++i) {
    const int row = i >> 1 & 1;
    const float e = exp2_fast(__uint_as_float(s[i]) - rows.reference[row]);
    rows.sum[row] += e;
    s[i] = __float_as_uint(e);
  }
}

// The same scores again, by one warp on its own: the group's product was overwritten with exponentials.
template <class C>
__device__ __forceinline__ void scores_again(uint32_t (&s)[C::kKeys / 2], const AttentionRows& rows, uint32_t k) {
  const int lane = threadIdx.x & 31, row = threadIdx.x / 32 % 4 * 16 + lane / 4, byte = lane % 4 * 4;
#pragma unroll
  for (int n = 0; n < C::kKeys / 8; ++n) {
    int sum[4] = {0, 0, 0, 0};
#pragma unroll
    for (int step = 0; step < C::kHeadDim / 32; ++step) {
      uint32_t a[4], b[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = hopper::load(rows.q + C::swizzled((row + (i & 1) * 8) * C::kHeadDim + step * 32 + (i >> 1) * 16 + byte));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        b[i] = hopper::load(k + C::swizzled((n * 8 + lane / 4) * C::kHeadDim + step * 32 + i * 16 + byte));
      }
      asm volatile(
          "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) s[n * 4 + j] = static_cast<uint32_t>(sum[j]);
  }
}

// Exponentials in the accumulators' order are the left operand's, two columns a register.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t two;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}
template <int N>
__device__ __forceinline__ void to_left_operand(const uint32_t (&s)[2 * N], uint32_t (&weights)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) weights[i] = pack_bf16(__uint_as_float(s[2 * i]), __uint_as_float(s[2 * i + 1]));
}

// Scores to weights against the rows' references. Returns whether any of the warp's rows got a new one; earlier outputs
// are then to be multiplied by `shrink`.
template <class C>
__device__ __forceinline__ bool exponentials(uint32_t (&s)[C::kKeys / 2], uint32_t (&weights)[C::kKeys / 4], uint32_t k,
                                             uint32_t scales, AttentionRows& rows, float (&shrink)[2],
                                             float4 first_scales) {
  float sum[2] = {rows.sum[0], rows.sum[1]};
  float4 next_scales = load_scales(scales, 1);
#pragma unroll
  for (int pair = 0; pair < C::kKeys / 16; ++pair) {
    const float4 four = first_scales;
    first_scales = next_scales;
    const float k_scale[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float e[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float score = __int2float_rn(static_cast<int>(s[pair * 8 + half * 4 + row * 2 + n]));
          e[n] = exp2_fast(fmaf(score * k_scale[half * 2 + n], rows.scale[row], -rows.reference[row]));
          sum[row] += e[n];
        }
        weights[pair * 4 + half * 2 + row] = pack_bf16(e[0], e[1]);
        // The load is made to wait for this: else conversions of all columns are issued first, and exponentials last.
        if (half == 0 && row == 0 && pair + 2 < C::kKeys / 16) {
          next_scales = load_scales(scales | (__float_as_uint(e[0]) & rows.zero), pair + 2);
        }
      }
    }
  }
  if (__any_sync(0xffffffffu, sum[0] > kSumLimit || sum[1] > kSumLimit)) {
    scores_again<C>(s, rows, k);
    exponentials_of_maximum<C, false>(s, scales, rows, shrink, 0, 0.f);
    to_left_operand(s, weights);
    return true;
  }
  rows.sum[0] = sum[0];
  rows.sum[1] = sum[1];
  return false;
}

template <class C>
__device__ __forceinline__ void begin_scores(uint32_t (&s)[C::kKeys / 2], uint32_t q_address, uint32_t k_address) {
  const hopper::Matrix q(q_address, 16, 8 * C::kHeadDim, C::kSwizzle), k(k_address, 16, 8 * C::kHeadDim, C::kSwizzle);
  hopper::pin(s);
  hopper::products_begin();
#pragma unroll
  for (int step = 0; step < C::kHeadDim / 32; ++step) {
    hopper::product_s8(s, q.at(step * 32), k.at(step * 32), step > 0);
  }
  hopper::products_commit();
}

template <class C>
__device__ __forceinline__ void begin_output(float (&out)[C::kHeadDim / 2], const uint32_t (&weights)[C::kKeys / 4],
                                             uint32_t v_address) {
  const hopper::Matrix v(v_address, C::kVPanel, 1024, 1);
  hopper::pin(out);
  hopper::products_begin();
#pragma unroll
  for (int step = 0; step < C::kKeys / 16; ++step) {
    hopper::product_bf16(out, weights + step * 4, v.at(step * 2048));
  }
  hopper::products_commit();
}

// The group's queries to shared memory, where the last tile's products are done.
template <class C>
__device__ __forceinline__ void load_rows(const Int8AttentionKernelParams& p, const TilePlace& place, int group,
                                          const int (&query)[2], AttentionRows& rows) {
  const int row_of_group = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4, byte = threadIdx.x % 4 * 4;
  hopper::named_sync(8 + group, 128);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int token = min(query[row], p.queries - 1);  // rows beyond the end are not stored
    const int8_t* q = p.q + place.batch * p.q_batch + token * p.q_token + place.head * C::kHeadDim + byte;
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 16; ++i) {
      hopper::store(rows.q + C::swizzled((row_of_group + row * 8) * C::kHeadDim + i * 16 + byte),
                    __ldg(reinterpret_cast<const uint32_t*>(q + i * 16)));
    }
    rows.scale[row] =
        __ldg(p.q_scale + place.batch * p.q_scale_batch + token * p.q_scale_token + place.head * p.q_scale_head) *
        p.score_scale;
    rows.reference[row] = -INFINITY;
    rows.sum[row] = 0.f;
  }
  hopper::fence_shared_writes();
  hopper::named_sync(8 + group, 128);
}

template <class C>
__device__ __forceinline__ void store_rows(const Int8AttentionKernelParams& p, const TilePlace& place,
                                           const AttentionWork& work, const int (&query)[2], AttentionRows& rows,
                                           const float (&out)[C::kHeadDim / 2]) {
  const int quad = threadIdx.x & 3;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float sum = rows.sum[row];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (query[row] >= p.queries) continue;
    const float scale = 1.f / sum, lse = rows.reference[row] + log2f(sum);
    if (work.slot >= 0) {
      const int64_t at = static_cast<int64_t>(work.slot) * C::kRows + query[row] - place.query;
      if (quad == 0) p.partial_lse[at] = lse;
#pragma unroll
      for (int i = 0; i < C::kHeadDim / 8; ++i) {
        const float2 two = {out[i * 4 + row * 2] * scale, out[i * 4 + row * 2 + 1] * scale};
        *reinterpret_cast<float2*>(p.partial + at * C::kHeadDim + i * 8 + quad * 2) = two;
      }
      continue;
    }
    const int64_t token = static_cast<int64_t>(place.batch) * p.queries + query[row];
    __nv_bfloat16* to = p.out + (token * p.heads + place.head) * C::kHeadDim;
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 8; ++i) {
      const __nv_bfloat162 two = __floats2bfloat162_rn(out[i * 4 + row * 2] * scale, out[i * 4 + row * 2 + 1] * scale);
      *reinterpret_cast<__nv_bfloat162*>(to + i * 8 + quad * 2) = two;
    }
    if (p.lse != nullptr && quad == 0) {
      p.lse[(static_cast<int64_t>(place.batch) * p.heads + place.head) * p.queries + query[row]] = lse * 0.69314718f;
    }
  }
}

template <class C>
__device__ __forceinline__ void multiply(float (&out)[C::kHeadDim / 2], const float (&by)[2]) {
#pragma unroll
  for (int i = 0; i < C::kHeadDim / 2; ++i) out[i] *= by[i >> 1 & 1];
}

template <class C>
__device__ __forceinline__ void consume(const Int8AttentionKernelParams& p, const AttentionMemory<C>& memory) {
  constexpr int kTurnThreads = 256;
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x), 0) / 128 - 1;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x & 31;
  const auto release = [&](uint32_t barrier) {
    __syncwarp();
    if (lane == 0) hopper::barrier_arrive(barrier);
  };
  // Groups take turns at the tensor cores: their products follow one another and their exponentials don't collide.
  const auto wait_turn = [&] { hopper::named_sync(1 + group, kTurnThreads); };
  const auto end_turn = [&] { hopper::named_arrive(1 + (group + 1) % C::kGroups, kTurnThreads); };
  if (group == C::kGroups - 1) hopper::named_arrive(1, kTurnThreads);

  uint32_t own_scales = (threadIdx.x & 3) * 16;
  asm volatile("" : "+r"(own_scales));  // else it is made again for every tile
  Stage<C::kStages> stage;
  AttentionRows rows;
  rows.q = memory.q(group);
  rows.zero = static_cast<uint32_t>(p.keys) >> 31;
  AttentionWork work;
  for (int step = 0; next_work(p, step, &work); ++step) {
    const TilePlace place = place_of(p, work.tile, C::kRows);
    const int first_row = place.query + group * 64 + warp * 16 + lane / 4;
    const int query[2] = {first_row, first_row + 8};
    load_rows<C>(p, place, group, query, rows);
    float out[C::kHeadDim / 2], shrink[2];
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 2; ++i) out[i] = 0.f;
    uint32_t s[C::kKeys / 2], weights[C::kKeys / 4];

    hopper::barrier_wait(memory.full(stage.index), stage.phase);
    begin_scores<C>(s, rows.q, memory.k(stage.index));
    hopper::products_wait<0>();
    hopper::pin(s);
    const int visible = p.keys - (work.end - 1) * C::kKeys;
    exponentials_of_maximum<C, true>(s, memory.scales(stage.index) + own_scales, rows, shrink, visible,
                                     p.last_key_bias);
    release(memory.empty(stage.index));
    stage.advance();
    to_left_operand(s, weights);

#pragma unroll 1
    for (int tile = work.end - 2; tile >= work.first; --tile) {
      hopper::barrier_wait(memory.full(stage.index), stage.phase);
      const int i = stage.index;
      stage.advance();
      wait_turn();
      begin_output<C>(out, weights, memory.v(i));
      hopper::products_wait<0>();
      hopper::pin(out);
      end_turn();
      begin_scores<C>(s, rows.q, memory.k(i));
      const float4 first_scales = load_scales(memory.scales(i) + own_scales, 0);
      hopper::products_wait<0>();
      hopper::pin(s);
      if (exponentials<C>(s, weights, memory.k(i), memory.scales(i) + own_scales, rows, shrink, first_scales)) {
        multiply<C>(out, shrink);
      }
      release(memory.empty(i));
    }

    hopper::barrier_wait(memory.full(stage.index), stage.phase);
    begin_output<C>(out, weights, memory.v(stage.index));
    hopper::products_wait<0>();
    hopper::pin(out);
    release(memory.empty(stage.index));
    stage.advance();
    store_rows<C>(p, place, work, query, rows, out);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    int8_attention_tiles(const __grid_constant__ Int8AttentionKernelParams p, const __grid_constant__ CUtensorMap k_map,
                         const __grid_constant__ CUtensorMap v_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t shared[];
  const AttentionMemory<C> memory = {(hopper::shared_address(shared) + 1023) & ~1023u};
  if (threadIdx.x == 0) {
    hopper::prefetch_map(&k_map);
    hopper::prefetch_map(&v_map);
    for (int i = 0; i < C::kStages; ++i) {
      hopper::barrier_init(memory.full(i), 2);  // the copies' thread and the scales' warp
      hopper::barrier_init(memory.empty(i), C::kGroups * 4);
    }
    hopper::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    hopper::give_registers<C::kProducerRegisters>();
    if (threadIdx.x == 0) produce_tiles<C>(p, memory, &k_map, &v_map);
    if (threadIdx.x / 32 == 1) produce_scales<C>(p, memory);
  } else {
    hopper::take_registers<C::kConsumerRegisters>();
    consume<C>(p, memory);
  }
#endif
}

}  // namespace lingbot::cuda
