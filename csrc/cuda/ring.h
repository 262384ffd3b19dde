// Where a token of the chunk goes in the K/V ring, in 32 bits; see Ring in params.h.
#pragma once

#include <cstdint>

#include "../params.h"

#ifdef __CUDACC__
#define LINGBOT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LINGBOT_HOST_DEVICE inline
#endif

namespace lingbot::cuda {

struct DeviceRing {
  const int32_t* cursor;  // where not null, what it points to is added to start
  uint32_t start;         // position of token 0, reduced as far as the slots stay the same
  uint32_t sink;
  uint32_t period;  // capacity - sink
};

// In [0, sink + period) for any position: a wrong cursor cannot reach outside the cache.
LINGBOT_HOST_DEVICE uint32_t ring_slot(uint32_t position, uint32_t sink, uint32_t period) {
  return position < sink ? position : sink + (position - sink) % period;
}

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t ring_slot(const DeviceRing& ring, uint32_t token) {
  const uint32_t start = ring.cursor ? static_cast<uint32_t>(*ring.cursor) : 0u;
  return ring_slot(start + ring.start + token, ring.sink, ring.period);
}
#endif

// Null, or why this ring can't take `tokens` tokens.
inline Status ring_problem(const Ring& ring, int64_t tokens) {
  if (ring.capacity > INT32_MAX) return "ring capacity must be below 2^31 tokens";
  if (ring.sink < 0 || ring.sink >= ring.capacity) return "ring sink must be in [0, capacity)";
  const int64_t period = ring.capacity - ring.sink;
  if (ring.cursor) return tokens > period ? "chunk is larger than capacity - sink" : nullptr;
  if (ring.chunk_start < 0) return "ring chunk_start must not be negative";
  const int64_t in_sink = ring.chunk_start < ring.sink ? ring.sink - ring.chunk_start : 0;
  return tokens - in_sink > period ? "chunk is larger than capacity - sink" : nullptr;
}

// Token 0 of a kernel is token `first` of the chunk.
inline DeviceRing device_ring(const Ring& ring, int64_t first = 0) {
  const int64_t period = ring.capacity - ring.sink;
  const int64_t position = ring.chunk_start + first;
  const int64_t start = position < ring.sink ? position : ring.sink + (position - ring.sink) % period;
  return {ring.cursor, static_cast<uint32_t>(ring.cursor ? first : start), static_cast<uint32_t>(ring.sink),
          static_cast<uint32_t>(period)};
}

}  // namespace lingbot::cuda
