// K and V of a received all-to-all buffer [tokens, batch, parts, heads, head_dim] go to their ring slots.
#include "dtype.h"
#include "parallel.h"
#include "ring.h"

namespace lingbot::cpu::LINGBOT_ISA {

Status qkv_unpack_kv_write(const QkvUnpackKvWriteParams& p, int threads) {
  if (p.batch <= 0 || p.tokens <= 0) return nullptr;
  if (p.heads < 1 || p.head_dim < 1) return "heads and head_dim must be at least 1";
  if (p.parts != 2 && p.parts != 3) return "parts must be 2 (k, v) or 3 (q, k, v)";
  if (p.packed == nullptr || p.k_cache.ptr == nullptr || p.v_cache.ptr == nullptr)
    return "packed, k_cache and v_cache must not be null";
  if (Status status = check_ring(p.ring, p.tokens)) return status;
  return with_dtype(p.dtype, [&](auto t) -> Status {
    using T = decltype(t);
    const int64_t part = int64_t{p.heads} * p.head_dim;
    const int64_t bytes = sizeof(T) * part;
    parallel_for(p.tokens * p.batch, 4 * bytes, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t s = i / p.batch, b = i % p.batch;
        const int64_t to = slot(p.ring, chunk_start(p.ring) + s);
        const T* k = static_cast<const T*>(p.packed) + (i * p.parts + p.parts - 2) * part;
        __builtin_memcpy(cache_row<T>(p.k_cache, b, to), k, bytes);
        __builtin_memcpy(cache_row<T>(p.v_cache, b, to), k + part, bytes);
      }
    });
    return nullptr;
  });
}

}  // namespace lingbot::cpu::LINGBOT_ISA
