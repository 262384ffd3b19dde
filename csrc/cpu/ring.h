// Where the tokens of a chunk lie in a K/V ring with a pinned sink (see Ring in params.h).
#pragma once

#include "../params.h"
#include "simd.h"

namespace lingbot::cpu::LINGBOT_ISA {
namespace {

LINGBOT_INLINE int64_t chunk_start(const Ring& ring) {
  return ring.cursor != nullptr ? *ring.cursor : ring.chunk_start;
}

LINGBOT_INLINE int64_t slot(const Ring& ring, int64_t position) {
  return position < ring.sink ? position : ring.sink + (position - ring.sink) % (ring.capacity - ring.sink);
}

inline Status check_ring(const Ring& ring, int64_t tokens) {
  if (ring.sink < 0 || ring.sink >= ring.capacity) return "ring.sink must be in [0, ring.capacity)";
  const int64_t start = chunk_start(ring);
  if (start < 0) return "ring.chunk_start (or the cursor's value) must be at least 0";
  const int64_t pinned = start < ring.sink ? ring.sink - start : 0;
  if (tokens - pinned > ring.capacity - ring.sink) return "the chunk is larger than ring.capacity - ring.sink";
  return nullptr;
}

template <class T>
LINGBOT_INLINE T* cache_row(const Cache& cache, int64_t batch, int64_t slot) {
  return static_cast<T*>(cache.ptr) + batch * cache.batch_stride + slot * cache.token_stride;
}

}  // namespace
}  // namespace lingbot::cpu::LINGBOT_ISA
