// What attention's blocks work on: parameters, the pieces of work, shared memory, and the warps that fill it.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "hopper.cuh"
#include "int8_attention_config.h"

namespace lingbot::cuda {

struct Int8AttentionKernelParams {
  const int8_t* q;  // a token's heads contiguous; strides in elements
  int64_t q_batch, q_token;
  const float* q_scale;
  int64_t q_scale_batch, q_scale_token, q_scale_head;
  const float* k_scale;
  int64_t k_scale_batch, k_scale_token, k_scale_head;
  __nv_bfloat16* out;   // [batch, queries, heads, head_dim]
  float* lse;           // [batch, heads, queries] or null
  float* partial;       // [2 * grid, rows of a tile, head_dim]: output of tiles that several blocks share
  float* partial_lse;   // [2 * grid, rows of a tile], base 2
  float score_scale;    // softmax scale * log2(e)
  float last_key_bias;  // log2 of the last key's weight
  int queries, keys, heads;
  int query_tiles, key_tiles;  // of one head
  int tiles, whole_tiles;  // the first whole_tiles are handed out one by one, the others cut evenly into ranges of keys
};

// kHeadDim: 64 or 128. Measured alternatives are in docs/measured/int8_attention.md.
template <int kHeadDim_>
struct AttentionShape {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeys = 96;   // of a tile
  static constexpr int kGroups = 3;  // consumer warpgroups
  static constexpr int kStages = 5;  // tiles of keys and values in flight
  static constexpr int kRows = 64 * kGroups, kThreads = 128 * (kGroups + 1);
  static constexpr int kKBytes = kKeys * kHeadDim, kVBytes = kKeys * kHeadDim * 2, kScaleBytes = kKeys * 4;
  static constexpr int kQBytes = 64 * kHeadDim;  // of a group
  static constexpr int kVPanel = kKeys * 128;    // 64 channels of every key
  static constexpr int kPanels = kHeadDim / 64;
  static constexpr int kSwizzle = kHeadDim == 128 ? 1 : 2;                 // of q and k: rows of 128 or 64 bytes
  static constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;  // 65536 in all
  static constexpr int kVOffset = kStages * kKBytes, kQOffset = kVOffset + kStages * kVBytes;
  static constexpr int kScaleOffset = kQOffset + kGroups * kQBytes,
                       kBarrierOffset = kScaleOffset + kStages * kScaleBytes;
  static constexpr int kSharedBytes = kBarrierOffset + kStages * 16 + 1024;  // 1024: alignment of the first tile

  // Byte `offset` of rows of kHeadDim bytes as the swizzle places it.
  static __device__ __forceinline__ uint32_t swizzled(uint32_t offset) {
    return offset ^ (offset >> 7 & (kHeadDim == 128 ? 7 : 3)) << 4;
  }
};

__device__ __forceinline__ bool next_work(const Int8AttentionKernelParams& p, int step, AttentionWork* work) {
  return attention_work(p.tiles, p.whole_tiles, p.key_tiles, blockIdx.x, gridDim.x, step, work);
}

struct TilePlace {
  int batch, head, query;
};
__device__ __forceinline__ TilePlace place_of(const Int8AttentionKernelParams& p, int tile, int rows) {
  const int of_head = tile / p.query_tiles;
  return {of_head / p.heads, of_head % p.heads, (tile - of_head * p.query_tiles) * rows};
}

// A position in the ring of stages.
template <int kStages>
struct Stage {
  int index = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++index == kStages) index = 0, phase ^= 1;
  }
};

// Shared memory of a block, as addresses. A stage holds the keys of a tile and the values of the tile taken before it.
template <class C>
struct AttentionMemory {
  uint32_t base;
  __device__ __forceinline__ uint32_t k(int stage) const { return base + stage * C::kKBytes; }
  __device__ __forceinline__ uint32_t v(int stage) const { return base + C::kVOffset + stage * C::kVBytes; }
  __device__ __forceinline__ uint32_t q(int group) const { return base + C::kQOffset + group * C::kQBytes; }
  __device__ __forceinline__ uint32_t scales(int stage) const {
    return base + C::kScaleOffset + stage * C::kScaleBytes;
  }
  __device__ __forceinline__ uint32_t full(int stage) const { return base + C::kBarrierOffset + stage * 16; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(stage) + 8; }
};

// One thread: keys and values of every piece of work, last tile of a piece first, as the consumers take them.
template <class C>
__device__ __forceinline__ void produce_tiles(const Int8AttentionKernelParams& p, const AttentionMemory<C>& memory,
                                              const CUtensorMap* k_map, const CUtensorMap* v_map) {
  Stage<C::kStages> stage;
  AttentionWork work;
  for (int step = 0; next_work(p, step, &work); ++step) {
    const TilePlace place = place_of(p, work.tile, C::kRows);
    for (int tile = work.end - 1; tile >= work.first - 1; --tile, stage.advance()) {
      const bool has_k = tile >= work.first, has_v = tile < work.end - 1;
      const uint32_t full = memory.full(stage.index);
      hopper::barrier_wait(memory.empty(stage.index), stage.phase ^ 1);
      hopper::barrier_expect(full, (has_k ? C::kKBytes : 0) + (has_v ? C::kVBytes : 0));
      if (has_k) hopper::copy_box(memory.k(stage.index), k_map, 0, place.head, tile * C::kKeys, place.batch, full);
      if (has_v) {
#pragma unroll
        for (int panel = 0; panel < C::kPanels; ++panel) {
          hopper::copy_box(memory.v(stage.index) + panel * C::kVPanel, v_map, panel * 64, place.head,
                           (tile + 1) * C::kKeys, place.batch, full);
        }
      }
    }
  }
}

// Where the scale of key `column` of a tile lies: a thread's four of every 16 are neighbours.
__device__ __forceinline__ int scale_slot(int column) {
  return (column & ~15) | (column & 6) << 1 | (column & 8) >> 2 | (column & 1);
}

// One warp: the keys' scales.
template <class C>
__device__ __forceinline__ void produce_scales(const Int8AttentionKernelParams& p, const AttentionMemory<C>& memory) {
  constexpr int kOfLane = (C::kKeys + 31) / 32;
  const int lane = threadIdx.x & 31;
  Stage<C::kStages> stage;
  AttentionWork work;
  for (int step = 0; next_work(p, step, &work); ++step) {
    const TilePlace place = place_of(p, work.tile, C::kRows);
    const float* scales = p.k_scale + place.batch * p.k_scale_batch + place.head * p.k_scale_head;
    for (int tile = work.end - 1; tile >= work.first - 1; --tile, stage.advance()) {
      float value[kOfLane];
#pragma unroll
      for (int n = 0; n < kOfLane; ++n) {
        const int column = n * 32 + lane, key = tile * C::kKeys + column;
        value[n] =
            tile >= work.first && column < C::kKeys && key < p.keys ? __ldg(scales + key * p.k_scale_token) : 0.f;
      }
      hopper::barrier_wait(memory.empty(stage.index), stage.phase ^ 1);
#pragma unroll
      for (int n = 0; n < kOfLane; ++n) {
        const int column = n * 32 + lane;
        if (column < C::kKeys)
          hopper::store(memory.scales(stage.index) + scale_slot(column) * 4, __float_as_uint(value[n]));
      }
      __syncwarp();
      if (lane == 0) hopper::barrier_arrive(memory.full(stage.index));
    }
  }
}

}  // namespace lingbot::cuda
