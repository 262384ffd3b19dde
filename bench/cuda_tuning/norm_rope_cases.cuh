// Norm + rope problems (ring write, write-only, pack): operands, reference, and the kernel variants that compete.
#pragma once

#include "../../csrc/cuda/norm_rope.cuh"
#include "harness.cuh"
#include "reference.cuh"

namespace tune {

using namespace lingbot;
using namespace lingbot::cuda;

struct NormRopeCase {
  int64_t batch = 1, tokens, heads, head_dim;
  bool has_q = true, has_v = true;
  int ranks = 0;       // 0: into the ring; else packed
  int64_t offset = 0;  // elements that q, k, v, weights and outputs are moved off their alignment
  int64_t pad = 0;     // elements between the rows of the projection
  int64_t chunk_start = 0, sink = 0, capacity = 0;
  bool device_cursor = false;

  int64_t dim() const { return heads * head_dim; }
  int parts() const { return 1 + has_q + has_v; }
};

template <typename T>
constexpr Dtype dtype_of() {
  return sizeof(T) == 4 ? Dtype::kFloat32 : std::is_same_v<T, __half> ? Dtype::kFloat16 : Dtype::kBFloat16;
}

// Operands of `sets` launches, and the reference of set 0.
template <typename T>
struct NormRopeProblem {
  NormRopeCase c;
  std::vector<QkNormRopeKvWriteParams> write;
  std::vector<QkNormRopePackParams> pack;
  double* ref[3] = {};  // q, k, v
  int64_t *slots = nullptr, *tokens_of = nullptr;
  unsigned char* named = nullptr;
  T *q_out = nullptr, *k_cache = nullptr, *v_cache = nullptr, *packed = nullptr;
  int64_t out_elements = 0, cache_elements = 0;

  int64_t bytes() const { return 2 * c.parts() * c.batch * c.tokens * c.dim() * sizeof(T); }

  NormRopeProblem(Arena& arena, const NormRopeCase& problem, int sets, uint32_t seed) : c(problem) {
    const int64_t dim = c.dim(), rows = c.batch * c.tokens, row = 3 * dim + c.pad, cap = c.capacity;
    T* weights = arena.take<T>(2 * dim + 2 * c.offset + 8) + c.offset;
    T* k_weight = weights + (dim + 7) / 8 * 8;
    randomise(weights, 2 * dim + 8, seed, 1.f, 0.2f);
    float* cos_sin = arena.take<float>(c.tokens * c.head_dim);
    randomise(cos_sin, c.tokens * c.head_dim, seed + 1, 0.f, 0.6f);
    int32_t* cursor = arena.take<int32_t>(1);
    const int32_t start = static_cast<int32_t>(c.chunk_start);
    check(cudaMemcpy(cursor, &start, 4, cudaMemcpyHostToDevice), "cursor");
    for (int s = 0; s < sets; ++s) {
      T* x = arena.take<T>(rows * row + c.offset) + c.offset;
      randomise(x, rows * row, seed + 10 + s, 0.1f, 1.5f);
      const Rows q = {c.has_q ? x : nullptr, c.tokens * row, row}, k = {x + dim, c.tokens * row, row};
      const Rows v = {c.has_v ? x + 2 * dim : nullptr, c.tokens * row, row};
      if (c.ranks == 0) {
        T* out = c.has_q ? arena.take<T>(rows * dim + c.offset) + c.offset : nullptr;
        T* kc = arena.take<T>(c.batch * cap * dim + c.offset) + c.offset;
        T* vc = arena.take<T>(c.batch * cap * dim + c.offset) + c.offset;
        if (s == 0)
          q_out = out, k_cache = kc, v_cache = vc, out_elements = rows * dim, cache_elements = c.batch * cap * dim;
        const Ring ring = {c.device_cursor ? -1 : c.chunk_start, c.device_cursor ? cursor : nullptr, c.sink, cap};
        write.push_back({q,
                         k,
                         v,
                         weights,
                         k_weight,
                         cos_sin,
                         {out, c.tokens * dim, dim, 0},
                         {kc, cap * dim, dim},
                         {vc, cap * dim, dim},
                         ring,
                         c.batch,
                         c.tokens,
                         static_cast<int32_t>(c.heads),
                         static_cast<int32_t>(c.head_dim),
                         dtype_of<T>(),
                         1e-6f});
      } else {
        T* out = arena.take<T>(rows * dim * c.parts() + c.offset) + c.offset;
        if (s == 0) packed = out, out_elements = rows * dim * c.parts();
        pack.push_back({q, k, v, weights, k_weight, cos_sin, out, c.batch, c.tokens, static_cast<int32_t>(c.heads),
                        static_cast<int32_t>(c.head_dim), c.ranks, dtype_of<T>(), 1e-6f});
      }
    }
    const Rows operands[3] = {c.ranks ? pack[0].q : write[0].q, c.ranks ? pack[0].k : write[0].k,
                              c.ranks ? pack[0].v : write[0].v};
    const T* weight_of[3] = {weights, k_weight, nullptr};
    Moments* moments = arena.take<Moments>(rows);
    for (int n = 0; n < 3; ++n) {
      if (!operands[n].ptr) continue;
      const T* in = static_cast<const T*>(operands[n].ptr);
      ref[n] = arena.take<double>(rows * dim);
      reference_moments<T, false><<<rows, 256>>>(in, c.tokens * row, row, c.tokens, dim, moments);
      reference_norm_rope<T><<<1024, 256>>>(in, c.tokens * row, row, c.tokens, dim, moments, 1e-6, weight_of[n],
                                            cos_sin, c.head_dim, rows, ref[n]);
    }
    std::vector<int64_t> slot(rows);
    std::vector<unsigned char> is_named(std::max<int64_t>(1, c.batch * cap), 0);
    for (int64_t b = 0; b < c.batch && cap; ++b) {
      for (int64_t t = 0; t < c.tokens; ++t) {
        const int64_t p = c.chunk_start + t, at = p < c.sink ? p : c.sink + (p - c.sink) % (cap - c.sink);
        slot[b * c.tokens + t] = b * cap + at;
        is_named[b * cap + at] = 1;
      }
    }
    slots = arena.take<int64_t>(rows);
    named = arena.take<unsigned char>(is_named.size());
    check(cudaMemcpy(slots, slot.data(), rows * 8, cudaMemcpyHostToDevice), "slots");
    check(cudaMemcpy(named, is_named.data(), is_named.size(), cudaMemcpyHostToDevice), "named");
    check(cudaDeviceSynchronize(), "reference");
  }

  void poison() {
    if (q_out) check(cudaMemset(q_out, kPoison, out_elements * sizeof(T)), "poison");
    if (packed) check(cudaMemset(packed, kPoison, out_elements * sizeof(T)), "poison");
    if (k_cache) check(cudaMemset(k_cache, kPoison, cache_elements * sizeof(T)), "poison");
    if (v_cache) check(cudaMemset(v_cache, kPoison, cache_elements * sizeof(T)), "poison");
  }

  void compare(Gate& gate, Arena& scratch) {
    const int64_t dim = c.dim(), rows = c.batch * c.tokens;
    if (c.ranks == 0) {
      if (c.has_q) gate.rows<T>(q_out, dim, nullptr, ref[0], rows, dim);
      gate.rows<T>(k_cache, dim, slots, ref[1], rows, dim);
      gate.untouched(k_cache, dim * sizeof(T), c.batch * c.capacity, named);
      if (c.has_v) gate.rows<T>(v_cache, dim, slots, ref[2], rows, dim);
      else
        check(cudaMemset(named, 0, c.batch * c.capacity), "named"),
            gate.untouched(v_cache, dim * sizeof(T), c.batch * c.capacity, named);
      return;
    }
    // [ranks, tokens, batch, parts, heads / ranks, head_dim] back to rows of each part
    const int64_t width = dim / c.ranks;
    std::vector<int64_t> base(rows);
    for (int n = 0, part = 0; n < 3; ++n) {
      if (!ref[n]) continue;
      for (int64_t r = 0; r < c.ranks; ++r) {
        for (int64_t i = 0; i < rows; ++i) {
          base[i] = ((r * c.tokens + i % c.tokens) * c.batch + i / c.tokens) * c.parts() + part;
        }
        check(cudaMemcpy(slots, base.data(), rows * 8, cudaMemcpyHostToDevice), "slots");
        gather_rows<<<1024, 256>>>(ref[n] + r * width, dim, rows, width, columns(scratch, rows * width));
        gate.rows<T>(packed, width, slots, columns(scratch, rows * width), rows, width);
        check(cudaDeviceSynchronize(), "compare");
      }
      ++part;
    }
  }

 private:
  double* column_block_ = nullptr;
  double* columns(Arena& scratch, int64_t count) {
    if (!column_block_) column_block_ = scratch.take<double>(count);
    return column_block_;
  }
};

}  // namespace tune
