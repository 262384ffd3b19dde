// Hopper's own instructions, one function each: barriers in shared memory, tensor copies, register shares, and products
// of a warpgroup. Everything here needs sm_90a; the PTX ISA's chapters on mbarrier, cp.async.bulk.tensor and wgmma
// define the operands.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace lingbot::cuda::hopper {

__device__ __forceinline__ uint32_t shared_address(const void* ptr) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(ptr));
}

__device__ __forceinline__ uint32_t load(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address));
  return x;
}
__device__ __forceinline__ void store(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

// Ordinary stores to shared memory become visible to products and copies.
__device__ __forceinline__ void fence_shared_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- barriers ----

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;"); }

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives and announces `bytes` that copies will bring.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the barrier's phase of this parity is complete.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef LINGBOT_WATCHDOG  // builds for debugging: a hang becomes an error
  const long long start = clock64();
#endif
  uint32_t done;
  do {
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
#ifdef LINGBOT_WATCHDOG
    if (clock64() - start > 2000000000LL) __trap();
#endif
  } while (done == 0);
}

// Named barriers of `threads` threads: wait for all, or only count as arrived.
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- tensor copies ----

// The box of `map` at (x, y, z, w), x innermost, into shared memory; elements outside of the tensor become zeros.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, int x, int y, int z, int w,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- registers ----

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- products of a warpgroup ----

// Where a matrix lies in shared memory, as wgmma's descriptor says it. `swizzle`: 1 for rows of 128 bytes, 2 for 64
// (the copy's swizzle is the same); `leading` and `stride`: bytes between neighbouring blocks of the layout.
struct Matrix {
  uint32_t low, high;

  __device__ __forceinline__ Matrix(uint32_t address, uint32_t leading, uint32_t stride, uint32_t swizzle)
      : low((address >> 4) + (leading >> 4 << 16)), high(stride >> 4 | swizzle << 30) {}

  // The descriptor of what begins `bytes` further on.
  __device__ __forceinline__ uint64_t at(uint32_t bytes) const {
    return static_cast<uint64_t>(high) << 32 | (low + (bytes >> 4));
  }
};

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads and writes of accumulators across this point.
template <int N>
__device__ __forceinline__ void pin(uint32_t (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}
template <int N>
__device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// Operands of the instructions below: 8 or 32 accumulators, and their numbers.
#define LINGBOT_8(c, d, i) \
  c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define LINGBOT_32(c, d, i) LINGBOT_8(c, d, i), LINGBOT_8(c, d, i + 8), LINGBOT_8(c, d, i + 16), LINGBOT_8(c, d, i + 24)
#define LINGBOT_INT(x) "+r"(x)
#define LINGBOT_FLOAT(x) "+f"(x)
#define LINGBOT_N32                                                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define LINGBOT_N48 LINGBOT_N32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define LINGBOT_N64 LINGBOT_N48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d[64 x 96] = a[64 x 32] b[96 x 32]^T in int8, or (add) d + that; both in shared memory, rows of K contiguous.
__device__ __forceinline__ void product_s8(uint32_t (&d)[48], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %50, 0;\n"
      " wgmma.mma_async.sync.aligned.m64n96k32.s32.s8.s8 {" LINGBOT_N48 "}, %48, %49, p;\n}"
      : LINGBOT_32(LINGBOT_INT, d, 0), LINGBOT_8(LINGBOT_INT, d, 32), LINGBOT_8(LINGBOT_INT, d, 40)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

// d[64 x 64] += a[64 x 16] b[16 x 64] in bfloat16; a in registers, b in shared memory, rows of N contiguous.
__device__ __forceinline__ void product_bf16(float (&d)[32], const uint32_t* a, uint64_t b) {
  asm volatile(
      "{\n .reg .pred p;\n setp.eq.b32 p, 0, 0;\n"
      " wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" LINGBOT_N32
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"
      : LINGBOT_32(LINGBOT_FLOAT, d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// The same with d[64 x 128] and b[16 x 128].
__device__ __forceinline__ void product_bf16(float (&d)[64], const uint32_t* a, uint64_t b) {
  asm volatile(
      "{\n .reg .pred p;\n setp.eq.b32 p, 0, 0;\n"
      " wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" LINGBOT_N64
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
      : LINGBOT_32(LINGBOT_FLOAT, d, 0), LINGBOT_32(LINGBOT_FLOAT, d, 32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef LINGBOT_8
#undef LINGBOT_32
#undef LINGBOT_INT
#undef LINGBOT_FLOAT
#undef LINGBOT_N32
#undef LINGBOT_N48
#undef LINGBOT_N64

}  // namespace lingbot::cuda::hopper
