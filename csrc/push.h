// What the launchers that write to several ranks' memory refuse, on the CPU and on GPUs alike.
#pragma once

#include "params.h"

namespace lingbot {

inline Status push_problem(int64_t ranks, int64_t heads, int64_t first_token) {
  if (ranks < 1 || heads % ranks != 0) return "ranks must divide heads";
  if (ranks > kMaxRanks) return "ranks must be at most 64";
  if (first_token < 0) return "first_token must not be negative";
  return nullptr;
}

// `ends`, where given: a rank without tokens needs no address.
inline Status addresses_problem(const int64_t* addresses, int64_t count, Dtype dtype, const int64_t* ends = nullptr) {
  if (addresses == nullptr) return "addresses must not be null";
  const int64_t size = dtype == Dtype::kFloat32 ? 4 : 2;
  for (int64_t i = 0; i < count; ++i) {
    if (ends != nullptr && ends[i] == (i == 0 ? 0 : ends[i - 1])) continue;
    if (addresses[i] == 0 || addresses[i] % size != 0) return "addresses must be those of elements, none null";
  }
  return nullptr;
}

// The addresses of codes, scales and V.
inline Status quantized_push_problem(const QkNormRopeQuantizePushParams& p) {
  if (p.addresses == nullptr) return "addresses must not be null";
  const int64_t* codes = p.addresses + (p.q.ptr == nullptr ? 2 * p.ranks : 0);
  for (; codes < p.addresses + 4 * p.ranks; codes += 2 * p.ranks) {
    for (int64_t r = 0; r < p.ranks; ++r) {
      if (codes[r] == 0) return "addresses must be those of elements, none null";
    }
    if (Status status = addresses_problem(codes + p.ranks, p.ranks, Dtype::kFloat32)) return status;
  }
  return addresses_problem(p.addresses + 4 * p.ranks, p.ranks, p.dtype);
}

// Ends of the ranks' tokens: in order, the last one `tokens`.
inline Status ends_problem(const int64_t* ends, int64_t ranks, int64_t tokens) {
  if (ends == nullptr) return "ends must not be null";
  int64_t before = 0;
  for (int64_t r = 0; r < ranks; before = ends[r++]) {
    if (ends[r] < before) return "ends must not decrease";
  }
  return before == tokens ? nullptr : "ends must end with tokens";
}

}  // namespace lingbot
