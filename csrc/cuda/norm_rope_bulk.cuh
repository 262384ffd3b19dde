// The norm + rope pass on the bulk copy engine (compute capability 9.0 and later): rows arrive in shared memory several
// tokens ahead, V leaves from there without passing through registers.
#pragma once

#include "norm_rope.cuh"

namespace lingbot::cuda {

namespace bulk {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void init_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void expect_bytes(uint64_t* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

__device__ __forceinline__ void wait_barrier(uint64_t* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "retry:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra retry;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

template <bool kEvictFirst>
__device__ __forceinline__ void load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  if constexpr (kEvictFirst) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(detail::evict_first_policy())
        : "memory");
  } else {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
  }
#endif
}

__device__ __forceinline__ void store(void* global, const void* shared, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Until all but the newest kPending stores have read their shared memory.
template <int kPending>
__device__ __forceinline__ void wait_stores_read() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#endif
}

__device__ __forceinline__ void wait_stores() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

}  // namespace bulk

// Shared memory of one block.
constexpr size_t norm_rope_bulk_bytes(int stages, int parts, int dim, int element_size) {
  return static_cast<size_t>(stages) * parts * dim * element_size;
}

// Blocks step through the tokens gridDim.x apart (one token each where gridDim.x = tokens), kStages of them in flight
// or in work. Thread 0 issues every bulk copy. blockDim.x * kVecs * V >= dim, and blockDim.x * V is a multiple of
// head_dim where kVecs > 1. One group of heads only.
template <typename T, int V, int kVecs, int kThreads, int kMinBlocks, int kStages, bool kQ, LoadHint kLoad,
          StoreHint kStore>
__global__ void __launch_bounds__(kThreads == 0 ? max_row_threads(kVecs) : kThreads, kMinBlocks)
    norm_rope_bulk(const __grid_constant__ NormRopeParams p) {
  constexpr int kNormed = kQ ? 2 : 1;
  constexpr int kLag =
      kStages > 1 ? 1 : 0;  // a stage is refilled this many tokens after its use: its V has left by then
  extern __shared__ __align__(128) unsigned char stages[];
  __shared__ uint64_t full[kStages];
  __shared__ float shared[2][kNormed][kMaxWarps];
  const uint32_t row_bytes = p.dim * sizeof(T), stage_bytes = row_bytes * p.parts, batch = blockIdx.y;
  const bool leader = threadIdx.x == 0, has_v = p.parts > kNormed;

  const auto fill = [&](uint32_t token, uint32_t stage) {
    bulk::expect_bytes(&full[stage], stage_bytes);
    for (uint32_t n = 0; n < p.parts; ++n) {
      const NormRopePart& part = p.part[n];
      const T* in = static_cast<const T*>(part.in) + batch * part.in_batch + token * part.in_token;
      bulk::load<kLoad == LoadHint::kEvictFirst || kLoad == LoadHint::kEvictFirstL2>(
          stages + stage * stage_bytes + n * row_bytes, in, row_bytes, &full[stage]);
    }
  };

  if (leader) {
    for (int s = 0; s < kStages; ++s) bulk::init_barrier(&full[s]);
    bulk::fence_barrier_init();
  }
  __syncthreads();
  wait_for_previous_grid();
  allow_next_grid();
  if (leader) {
    for (uint32_t s = 0; s < kStages; ++s) {
      const uint64_t token = blockIdx.x + static_cast<uint64_t>(s) * gridDim.x;
      if (token < p.tokens) fill(static_cast<uint32_t>(token), s);
    }
  }

  Vec<T, V> w[kNormed][kVecs];
#pragma unroll
  for (int n = 0; n < kNormed; ++n) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int e = row_element<V, kThreads>(i);
      w[n][i] =
          in_row<kThreads>(e, p.dim) ? load_cached<V>(static_cast<const T*>(p.part[n].weight) + e) : zero_vec<T, V>();
    }
  }

  uint32_t stage = 0, parity = 0, turn = 0;
  for (uint64_t next = blockIdx.x; next < p.tokens; next += gridDim.x) {
    const uint32_t token = static_cast<uint32_t>(next);
    unsigned char* rows = stages + stage * stage_bytes;
    float cos[V / 2], sin[V / 2];
    load_cos_sin(p, token, threadIdx.x * V, cos, sin);
    bulk::wait_barrier(&full[stage], parity);
    if (leader && has_v) {
      const NormRopePart& v = p.part[kNormed];
      bulk::store(static_cast<T*>(v.out) + out_offset(p, v, batch, token), rows + kNormed * row_bytes, row_bytes);
    }
    Vec<T, V> x[kNormed][kVecs];
    float sum[kNormed];
#pragma unroll
    for (int n = 0; n < kNormed; ++n) {
      sum[n] = 0.f;
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const int e = row_element<V, kThreads>(i);
        x[n][i] = in_row<kThreads>(e, p.dim) ? load_cached<V>(reinterpret_cast<const T*>(rows + n * row_bytes) + e)
                                             : zero_vec<T, V>();
        sum[n] += sum_of_squares(x[n][i]);
      }
    }
    row_sum(sum, shared[turn]);
    if (blockDim.x == 32) __syncwarp();
    // Past the barrier every thread holds its q and k: the stage of kLag tokens ago (or this one) is free once V has
    // left.
    const uint64_t ahead = next + static_cast<uint64_t>(kStages - kLag) * gridDim.x;
    if (leader && ahead < p.tokens && next >= static_cast<uint64_t>(kLag) * gridDim.x + blockIdx.x) {
      bulk::wait_stores_read<kLag>();
      fill(static_cast<uint32_t>(ahead), kLag == 0 ? stage : stage == 0 ? kStages - 1 : stage - 1);
    }
#pragma unroll
    for (int n = 0; n < kNormed; ++n) {
      const float inv_rms = rsqrtf(sum[n] * p.inv_dim + p.eps);
      T* out = static_cast<T*>(p.part[n].out) + out_offset(p, p.part[n], batch, token);
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const int e = row_element<V, kThreads>(i);
        if (!in_row<kThreads>(e, p.dim)) continue;
        keep_packed(x[n][i]);
        keep_packed(w[n][i]);
        store_vec<kStore>(out + e, norm_rotate(x[n][i], w[n][i], inv_rms, cos, sin));
      }
    }
    turn ^= 1;
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  if (leader) bulk::wait_stores();
}

}  // namespace lingbot::cuda
