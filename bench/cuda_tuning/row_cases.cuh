// Problems of the passes over residual rows and of the copies: operands, reference, comparison.
#pragma once

#include "norm_rope_cases.cuh"

namespace tune {

enum class RowOp { kRmsNorm, kLayerNorm, kResidualNorm, kCameraNorm, kGatedResidual };

struct RowCase {
  RowOp op;
  int64_t batch = 1, tokens, dim;
  bool optional = true;  // the gate and the camera are there
  bool camera = true;    // the camera is, where the gate is
  int64_t offset = 0;    // elements that operands are moved off their alignment
};

template <typename T, typename R>
struct RowProblem {
  RowCase c;
  std::vector<RmsNormParams> rms;
  std::vector<LayerNormModulateParams> layer;
  std::vector<ResidualNormModulateParams> residual;
  std::vector<GatedResidualCameraNormParams> camera;
  std::vector<GatedResidualParams> gated;
  double *ref_x = nullptr, *ref_y = nullptr;
  R* x_out = nullptr;
  T* y = nullptr;

  bool writes_x() const {
    return c.op == RowOp::kResidualNorm || c.op == RowOp::kCameraNorm || c.op == RowOp::kGatedResidual;
  }
  bool writes_y() const { return c.op != RowOp::kGatedResidual; }
  static int64_t bytes_of(const RowCase& c) {
    const int64_t n = c.batch * c.tokens * c.dim, r = sizeof(R), t = sizeof(T);
    switch (c.op) {
      case RowOp::kRmsNorm: return n * 2 * t;
      case RowOp::kLayerNorm: return n * (r + t);
      case RowOp::kResidualNorm: return n * (2 * r + 2 * t);
      case RowOp::kCameraNorm: return n * (2 * r + (c.optional && c.camera ? 4 : 2) * t);
      case RowOp::kGatedResidual: return n * (2 * r + t);
    }
    return 0;
  }

  RowProblem(Arena& arena, const RowCase& problem, int sets, uint32_t seed) : c(problem) {
    const int64_t dim = c.dim, rows = c.batch * c.tokens, n = rows * dim;
    const auto channels = [&](uint32_t s) {
      float* p = arena.take<float>(c.batch * dim);
      randomise(p, c.batch * dim, s, 0.1f, 0.4f);
      return Modulation{p, dim};
    };
    const auto operand = [&](auto tag, int64_t count, uint32_t s, float mean, float scale) {
      using E = typename decltype(tag)::type;
      E* p = arena.take<E>(count + c.offset) + c.offset;
      randomise(p, count, s, mean, scale);
      return p;
    };
    const TypeTag<T> t;
    const TypeTag<R> r;
    const Modulation shift = channels(seed), scale = channels(seed + 1);
    const Modulation gate = c.optional ? channels(seed + 2) : Modulation{nullptr, 0};
    const T *weight = operand(t, dim, seed + 3, 1.f, 0.2f), *bias = operand(t, dim, seed + 4, 0.f, 0.3f);
    const Dtype td = dtype_of<T>(), rd = dtype_of<R>();
    const int32_t d = static_cast<int32_t>(dim);
    const bool cam = c.optional && c.camera && c.op == RowOp::kCameraNorm;
    R* first_x = nullptr;
    T *first_delta = nullptr, *first_scale = nullptr, *first_shift = nullptr;
    for (int s = 0; s < sets; ++s) {
      const uint32_t k = seed + 100 + 10 * s;
      R* x = operand(r, n, k, 3.f, 1.5f);
      T* delta = writes_x() ? operand(t, n, k + 1, 0.f, 1.f) : nullptr;
      T* cam_scale = cam ? operand(t, n, k + 2, 0.f, 0.3f) : nullptr;
      T* cam_shift = cam ? operand(t, n, k + 3, 0.f, 0.5f) : nullptr;
      R* xo = writes_x() ? arena.take<R>(n + c.offset) + c.offset : nullptr;
      T* yo = writes_y() ? arena.take<T>(n + c.offset) + c.offset : nullptr;
      if (s == 0)
        x_out = xo, y = yo, first_x = x, first_delta = delta, first_scale = cam_scale, first_shift = cam_shift;
      switch (c.op) {
        case RowOp::kRmsNorm:
          rms.push_back({{x, c.tokens * dim, dim}, weight, yo, c.batch, c.tokens, d, td, 1e-6f});
          break;
        case RowOp::kLayerNorm: layer.push_back({x, shift, scale, yo, c.batch, c.tokens, d, rd, td, 1e-6f}); break;
        case RowOp::kResidualNorm:
          residual.push_back({x, delta, gate, shift, scale, xo, yo, c.batch, c.tokens, d, rd, td, 1e-6f});
          break;
        case RowOp::kCameraNorm:
          camera.push_back(
              {x, delta, gate, cam_scale, cam_shift, weight, bias, xo, yo, c.batch, c.tokens, d, rd, td, 1e-6f});
          break;
        case RowOp::kGatedResidual: gated.push_back({x, delta, gate, xo, c.batch, c.tokens, d, rd, td}); break;
      }
    }
    // The reference, one batch row at a time: its modulation has no batch.
    R* rounded = arena.take<R>(n);
    ref_x = arena.take<double>(n), ref_y = arena.take<double>(n);
    Moments* m = arena.take<Moments>(c.tokens);
    for (int64_t b = 0; b < c.batch; ++b) {
      const int64_t at = b * c.tokens * dim;
      const auto shifted = [&](auto* p) { return p ? p + at : nullptr; };
      const float* g = gate.ptr ? gate.ptr + b * dim : nullptr;
      reference_residual<T, R><<<1024, 256>>>(first_x + at, shifted(first_delta), g, shifted(first_scale),
                                              shifted(first_shift), c.tokens, dim, rounded + at, ref_x + at);
      if (c.op == RowOp::kRmsNorm) {
        if constexpr (std::is_same_v<T, R>) {
          reference_moments<R, false><<<c.tokens, 256>>>(rounded + at, 0, dim, c.tokens, dim, m);
          reference_norm_rope<T>
              <<<1024, 256>>>(rounded + at, 0, dim, c.tokens, dim, m, 1e-6, weight, nullptr, 1, c.tokens, ref_y + at);
        }
      } else if (writes_y()) {
        const bool affine = c.op == RowOp::kCameraNorm;
        reference_moments<R, true><<<c.tokens, 256>>>(rounded + at, 0, dim, c.tokens, dim, m);
        reference_layer_norm<T, R><<<1024, 256>>>(rounded + at, m, 1e-6, scale.ptr + b * dim, shift.ptr + b * dim,
                                                  affine ? weight : nullptr, bias, c.tokens, dim, ref_y + at);
      }
    }
    check(cudaDeviceSynchronize(), "reference");
  }

  void poison() {
    const int64_t n = c.batch * c.tokens * c.dim;
    if (x_out) check(cudaMemset(x_out, kPoison, n * sizeof(R)), "poison");
    if (y) check(cudaMemset(y, kPoison, n * sizeof(T)), "poison");
  }

  void compare(Gate& gate, Arena&) {
    const int64_t rows = c.batch * c.tokens;
    if (x_out) gate.rows<R>(x_out, c.dim, nullptr, ref_x, rows, c.dim);
    if (y) gate.rows<T>(y, c.dim, nullptr, ref_y, rows, c.dim);
  }
};

// K and V out of a packed buffer into the ring; the buffer itself is the reference.
template <typename T>
struct UnpackProblem {
  int64_t batch, tokens, heads, head_dim, chunk_start, sink, capacity;
  int parts;
  std::vector<QkvUnpackKvWriteParams> params;
  double* ref[2] = {};
  int64_t* slots;
  unsigned char* named;
  T *k_cache, *v_cache;

  int64_t bytes() const { return 4 * batch * tokens * heads * head_dim * sizeof(T); }

  UnpackProblem(Arena& arena, int64_t batch_, int64_t tokens_, int64_t heads_, int64_t head_dim_, int parts_,
                int64_t offset, int64_t start, int64_t sink_, int64_t capacity_, int sets, uint32_t seed)
      : batch(batch_),
        tokens(tokens_),
        heads(heads_),
        head_dim(head_dim_),
        chunk_start(start),
        sink(sink_),
        capacity(capacity_),
        parts(parts_) {
    const int64_t width = heads * head_dim, rows = batch * tokens;
    T* first = nullptr;
    for (int s = 0; s < sets; ++s) {
      T* packed = arena.take<T>(rows * parts * width + offset) + offset;
      randomise(packed, rows * parts * width, seed + s);
      T *k = arena.take<T>(batch * capacity * width), *v = arena.take<T>(batch * capacity * width);
      if (s == 0) first = packed, k_cache = k, v_cache = v;
      params.push_back({packed,
                        parts,
                        {k, capacity * width, width},
                        {v, capacity * width, width},
                        {start, nullptr, sink, capacity},
                        batch,
                        tokens,
                        static_cast<int32_t>(heads),
                        static_cast<int32_t>(head_dim),
                        dtype_of<T>()});
    }
    std::vector<int64_t> slot(rows);
    std::vector<unsigned char> is_named(batch * capacity, 0);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t b = 0; b < batch; ++b) {  // rows in the order of the packed buffer: [tokens, batch]
        const int64_t p = start + t, at = b * capacity + (p < sink ? p : sink + (p - sink) % (capacity - sink));
        slot[t * batch + b] = at, is_named[at] = 1;
      }
    }
    slots = arena.take<int64_t>(rows);
    named = arena.take<unsigned char>(is_named.size());
    check(cudaMemcpy(slots, slot.data(), rows * 8, cudaMemcpyHostToDevice), "slots");
    check(cudaMemcpy(named, is_named.data(), is_named.size(), cudaMemcpyHostToDevice), "named");
    for (int n = 0; n < 2; ++n) {
      ref[n] = arena.take<double>(rows * width);
      reference_norm_rope<T><<<1024, 256>>>(first + (parts - 2 + n) * width, 0, parts * width, rows, width, nullptr,
                                            0.0, nullptr, nullptr, 1, rows, ref[n]);
    }
    check(cudaDeviceSynchronize(), "reference");
  }

  void poison() {
    check(cudaMemset(k_cache, kPoison, batch * capacity * heads * head_dim * sizeof(T)), "poison");
    check(cudaMemset(v_cache, kPoison, batch * capacity * heads * head_dim * sizeof(T)), "poison");
  }

  void compare(Gate& gate, Arena&) {
    const int64_t width = heads * head_dim;
    gate.rows<T>(k_cache, width, slots, ref[0], batch * tokens, width);
    gate.rows<T>(v_cache, width, slots, ref[1], batch * tokens, width);
    gate.untouched(k_cache, width * sizeof(T), batch * capacity, named);
    gate.untouched(v_cache, width * sizeof(T), batch * capacity, named);
  }
};

}  // namespace tune
