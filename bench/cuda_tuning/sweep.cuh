// Correctness of the launchers away from the tuned shapes: types, head sizes, odd widths, misaligned operands, batches,
// wraps.
#pragma once

#include <cmath>
#include <cstring>

#include "row_cases.cuh"

namespace tune {

// The table from the host's pow, cos and sin in double.
inline double* table_reference(Arena& arena, const RopeCosSinParams& a) {
  const int pairs = a.head_dim / 2, space = a.head_dim / 6, time = pairs - 2 * space;
  std::vector<double> ref(a.num_tokens * a.head_dim);
  for (int64_t i = 0; i < a.num_tokens; ++i) {
    const int64_t n = a.token_start + i, in_frame = n % a.frame_stride;
    const int64_t position[3] = {n / a.frame_stride, in_frame / a.width, in_frame % a.width};
    for (int p = 0; p < pairs; ++p) {
      const int axis = p < time ? 0 : p < time + space ? 1 : 2, j = axis == 0 ? p : (p - time) % space;
      const double angle =
          static_cast<double>(position[axis]) * std::pow(a.theta, -(2.0 * j) / (2.0 * (axis == 0 ? time : space)));
      ref[i * a.head_dim + p] = std::cos(angle);
      ref[i * a.head_dim + pairs + p] = std::sin(angle);
    }
  }
  double* out = arena.take<double>(ref.size());
  check(cudaMemcpy(out, ref.data(), ref.size() * 8, cudaMemcpyHostToDevice), "table");
  return out;
}

struct Sweep {
  Arena& arena;
  Gate& gate;
  cudaStream_t stream;
  int every = 1;  // run every so-manieth case
  int passed = 0, failed = 0, met = 0;

  template <typename Problem>
  void one(const std::string& name, Problem& problem, double share, const std::function<Status()>& launch) {
    if (met++ % every != 0) return;
    problem.poison();
    gate.clear();
    check(cudaDeviceSynchronize(), "poison");
    const Status s = launch();
    check(cudaStreamSynchronize(stream), name.c_str());
    problem.compare(gate, arena);
    const bool good = gate.passed(share) && !s;
    ++(good ? passed : failed);
    if (!good) {
      std::printf("sweep: %s: %s not finite %llu, touched %llu, unequal %llu, worst %.3g %.3g\n", name.c_str(),
                  s ? s : "", gate.last.not_finite, gate.last.touched, gate.last.wrong_bits, gate.last.worst[0],
                  gate.last.worst[1]);
    }
  }

  template <typename T>
  static double share() {
    return std::is_same_v<T, __half> ? 4e-3 : 5e-4;
  }

  template <typename T>
  void norm_rope() {
    const int64_t shapes[][2] = {{40, 128}, {12, 128}, {24, 128}, {5, 64}, {3, 80}, {2, 256}, {64, 128},
                                 {32, 256}, {64, 256}, {7, 6},    {1, 8},  {3, 50}, {9, 72}};
    for (const auto& [heads, head_dim] : shapes) {
      for (int mode = 0; mode < 7; ++mode) {
        NormRopeCase c;
        c.heads = heads, c.head_dim = head_dim, c.tokens = mode == 1 ? 1 : 37, c.batch = mode == 2 ? 3 : 1;
        c.has_q = mode != 3 && mode != 4, c.has_v = mode != 4 && mode != 5;
        c.offset = mode == 5 ? 1 : 0, c.pad = mode == 6 ? 8 : mode == 5 ? 3 : 0;
        c.sink = mode == 1 ? 0 : 11, c.capacity = 60,
        c.chunk_start = mode == 2   ? 3
                        : mode == 6 ? 1000000
                                    : 40,
        c.device_cursor = mode % 2;
        arena.reset();
        NormRopeProblem<T> p(arena, c, 1, 77 + mode);
        const std::string name = std::to_string(heads) + "x" + std::to_string(head_dim) + " mode " +
                                 std::to_string(mode) + " size " + std::to_string(sizeof(T));
        one("qk_norm_rope_kv_write " + name, p, share<T>(),
            [&] { return lingbot::cuda::qk_norm_rope_kv_write(p.write[0], stream); });
        if (mode > 3) continue;
        c.has_v = true;
        for (int ranks : {1, 2, 3, 4, 8}) {
          if (heads % ranks != 0) continue;
          c.ranks = ranks, c.capacity = 0;
          arena.reset();
          NormRopeProblem<T> packed(arena, c, 1, 99 + mode);
          one("qk_norm_rope_pack " + name + " ranks " + std::to_string(ranks), packed, share<T>(),
              [&] { return lingbot::cuda::qk_norm_rope_pack(packed.pack[0], stream); });
          one("qk_norm_rope_push " + name + " ranks " + std::to_string(ranks), packed, share<T>(),
              [&] { return push_like_pack<T>(packed.pack[0]); });
        }
      }
    }
    for (int parts : {2, 3}) {
      for (int64_t offset : {0, 1}) {
        for (int64_t heads : {1, 5, 10}) {
          arena.reset();
          UnpackProblem<T> p(arena, 2, 33, heads, heads == 1 ? 6 : 128, parts, offset, 30, 7, 50, 1, 5);
          one("qkv_unpack_kv_write parts " + std::to_string(parts), p, 0.0,
              [&] { return lingbot::cuda::qkv_unpack_kv_write(p.params[0], stream); });
        }
      }
    }
  }

  // The push, into the buffer of the pack: rank g's Q rows and rings are the places that the pack has for them.
  template <typename T>
  Status push_like_pack(const QkNormRopePackParams& a) {
    const int64_t width = int64_t{a.heads} * a.head_dim / a.ranks, parts = a.q.ptr ? 3 : 2;
    const int64_t of_token = a.batch * parts * width, of_rank = a.tokens * of_token;
    std::vector<int64_t> addresses(3 * a.ranks);
    for (int64_t part = 3 - parts; part < 3; ++part) {
      for (int64_t g = 0; g < a.ranks; ++g) {
        addresses[part * a.ranks + g] =
            reinterpret_cast<int64_t>(static_cast<T*>(a.out) + g * of_rank + (part - 3 + parts) * width);
      }
    }
    const Ring ring = {0, nullptr, 0, a.tokens};
    return lingbot::cuda::qk_norm_rope_push(
        {a.q, a.k, a.v, a.q_weight, a.k_weight, a.cos_sin, addresses.data(), parts * width, of_token, parts * width,
         of_token, parts * width, of_token, ring, 0, a.batch, a.tokens, a.heads, a.head_dim, a.ranks, a.dtype, a.eps},
        stream);
  }

  // Rows of all ranks' heads, each rank's columns from a buffer of its own; the reference is the row's index.
  template <typename T>
  struct OutputPush {
    int64_t batch, width, ranks;
    std::vector<int64_t> ends, strides, addresses;
    T *in, *out;
    int64_t tokens() const { return ends.back(); }

    void poison() { check(cudaMemset(out, kPoison, batch * tokens() * ranks * width * sizeof(T)), "poison"); }

    void compare(Gate& g, Arena& scratch) {
      const int64_t dim = ranks * width;
      std::vector<T> got(batch * tokens() * dim), want(batch * tokens() * width);
      check(cudaMemcpy(got.data(), out, got.size() * sizeof(T), cudaMemcpyDeviceToHost), "outputs");
      check(cudaMemcpy(want.data(), in, want.size() * sizeof(T), cudaMemcpyDeviceToHost), "inputs");
      for (int64_t r = 0, begin = 0; r < ranks; begin = ends[r++]) {
        const T* rows = got.data() + begin * batch * dim;
        for (int64_t b = 0; b < batch; ++b) {
          for (int64_t t = begin; t < ends[r]; ++t) {
            const T* row = rows + (b * (ends[r] - begin) + t - begin) * dim;
            for (int64_t c = 0; c < ranks; ++c) {
              g.unequal(std::memcmp(row + c * width, want.data() + (b * tokens() + t) * width, width * sizeof(T)) != 0);
            }
          }
        }
      }
    }
  };

  template <typename T>
  void outputs() {
    constexpr Dtype kDtype = dtype_of<T>();
    for (int64_t width : {1280, 6, 128}) {
      for (int64_t batch : {1, 2}) {
        for (const std::vector<int64_t>& ends : {std::vector<int64_t>{37}, {19, 37}, {5, 5, 6, 11}}) {
          arena.reset();
          OutputPush<T> p = {batch, width, static_cast<int64_t>(ends.size()), ends, {}, {}, nullptr, nullptr};
          const int64_t dim = p.ranks * width;
          p.in = arena.take<T>(batch * p.tokens() * width), p.out = arena.take<T>(batch * p.tokens() * dim);
          randomise(p.in, batch * p.tokens() * width, 7);
          for (int64_t r = 0, begin = 0; r < p.ranks; begin = ends[r++]) {
            p.strides.push_back((ends[r] - begin) * dim);
            p.addresses.push_back(reinterpret_cast<int64_t>(p.out + begin * batch * dim));
          }
          one("attention_output_push width " + std::to_string(width) + " ranks " + std::to_string(p.ranks), p, 0.0,
              [&] {
                Status status = nullptr;
                for (int64_t r = 0; r < p.ranks && !status; ++r) {
                  const AttentionOutputPushParams a = {{p.in, p.tokens() * width, width},
                                                       p.addresses.data(),
                                                       ends.data(),
                                                       p.strides.data(),
                                                       dim,
                                                       r * width,
                                                       batch,
                                                       p.tokens(),
                                                       static_cast<int32_t>(width),
                                                       static_cast<int32_t>(p.ranks),
                                                       kDtype};
                  status = lingbot::cuda::attention_output_push(a, stream);
                }
                return status;
              });
        }
      }
    }
  }

  // Segments as flash-attn-4 leaves them (a video's next to each other) or apart, against the softmax in double.
  template <typename T>
  struct Merge {
    int64_t batch, tokens, heads, head_dim, count, offset, pad;
    bool together;
    MergeSegmentsParams params = {};
    const double* ref = nullptr;
    unsigned char* named = nullptr;

    int64_t dim() const { return heads * head_dim; }
    int64_t rows() const { return batch * tokens; }

    void make(Arena& arena, uint32_t seed) {
      const int64_t row = dim() + pad, elements = count * rows() * row + offset, sums = count * batch * heads * tokens;
      const int64_t inner = tokens * row;
      T* segments = arena.take<T>(elements);
      float* lse = arena.take<float>(sums);
      randomise(segments, elements, seed), randomise(lse, sums, seed + 1, 3.f, 2.f);
      T* out = arena.take<T>((rows() + 1) * dim() + offset);
      const int64_t of_lse = heads * tokens;
      params = {segments + offset, together ? inner : batch * inner, together ? count * inner : inner, row,
                lse, together ? of_lse : batch * of_lse, together ? count * of_lse : of_lse, tokens,
                out + offset, batch, tokens, static_cast<int32_t>(count), static_cast<int32_t>(heads),
                static_cast<int32_t>(head_dim), dtype_of<T>()};
      ref = reference(arena, segments, elements, lse, sums);
      const std::vector<unsigned char> rows_named(rows(), 1);
      named = arena.take<unsigned char>(rows() + 1);
      check(cudaMemset(named, 0, rows() + 1), "named");
      check(cudaMemcpy(named, rows_named.data(), rows(), cudaMemcpyHostToDevice), "named");
    }

    double* reference(Arena& arena, const T* segments, int64_t elements, const float* lse, int64_t sums) const {
      std::vector<T> x(elements);
      std::vector<float> l(sums);
      check(cudaMemcpy(x.data(), segments, elements * sizeof(T), cudaMemcpyDeviceToHost), "segments");
      check(cudaMemcpy(l.data(), lse, sums * sizeof(float), cudaMemcpyDeviceToHost), "lse");
      std::vector<double> merged(rows() * dim());
      for (int64_t i = 0; i < rows() * heads; ++i) {
        const int64_t h = i % heads, s = i / heads % tokens, b = i / heads / tokens;
        const auto weight = [&](int64_t n) {
          const auto& p = params;
          return std::exp(static_cast<double>(l[n * p.lse_segment_stride + b * p.lse_batch_stride + h * tokens + s]));
        };
        double sum = 0.0;
        for (int64_t n = 0; n < count; ++n) sum += weight(n);
        for (int64_t n = 0; n < count; ++n) {
          const int64_t at = offset + n * params.segment_stride + b * params.batch_stride + s * params.token_stride;
          const double share = weight(n) / sum;
          for (int64_t e = 0; e < head_dim; ++e)
            merged[i * head_dim + e] += share * static_cast<double>(static_cast<float>(x[at + h * head_dim + e]));
        }
      }
      double* out = arena.take<double>(merged.size());
      check(cudaMemcpy(out, merged.data(), merged.size() * sizeof(double), cudaMemcpyHostToDevice), "merged");
      return out;
    }

    void poison() { check(cudaMemset(params.out, kPoison, (rows() + 1) * dim() * sizeof(T)), "poison"); }
    void compare(Gate& g, Arena&) {
      g.rows<T>(static_cast<const T*>(params.out), dim(), nullptr, ref, rows(), dim());
      g.untouched(params.out, dim() * sizeof(T), rows() + 1, named);
    }
  };

  template <typename T>
  void merges() {
    const int64_t shapes[][4] = {{1, 37, 12, 128}, {2, 37, 3, 80}, {3, 1, 40, 128}, {1, 130, 1, 6}, {2, 5, 5, 50}};
    for (const auto& [batch, tokens, heads, head_dim] : shapes) {
      for (int64_t count : {1, 2, 3, 4, 5, 64}) {
        for (int mode = 0; mode < 4; ++mode) {
          arena.reset();
          Merge<T> p = {batch, tokens, heads, head_dim, count, mode == 2 ? 1 : 0, mode == 3 ? 8 : 0, mode != 1};
          p.make(arena, 55 + mode);
          one("merge_segments " + std::to_string(heads) + "x" + std::to_string(head_dim) + " of " +
                  std::to_string(count) + " mode " + std::to_string(mode) + " size " + std::to_string(sizeof(T)),
              p, share<T>(), [&] { return lingbot::cuda::merge_segments(p.params, stream); });
        }
      }
    }
  }

  template <typename T, typename R>
  void rows() {
    for (int64_t dim : {5120, 3072, 1536, 8192, 640, 64, 8, 33, 5121, 1000, 12000}) {
      for (int mode = 0; mode < 3; ++mode) {
        RowCase c;
        c.tokens = mode == 1 ? 1 : 19, c.batch = mode == 2 ? 3 : 1, c.dim = dim, c.optional = mode != 2,
        c.offset = mode == 1 ? 1 : 0;
        const std::string name = " dim " + std::to_string(dim) + " mode " + std::to_string(mode) + " sizes " +
                                 std::to_string(sizeof(T)) + std::to_string(sizeof(R));
        const auto run = [&](RowOp op, const char* what, const auto& launch) {
          c.op = op;
          arena.reset();
          RowProblem<T, R> p(arena, c, 1, 31 + mode);
          one(what + name, p, share<T>(), [&] { return launch(p); });
        };
        if constexpr (std::is_same_v<T, R>) {
          run(RowOp::kRmsNorm, "rms_norm", [&](auto& p) { return lingbot::cuda::rms_norm(p.rms[0], stream); });
        }
        run(RowOp::kLayerNorm, "layer_norm_modulate",
            [&](auto& p) { return lingbot::cuda::layer_norm_modulate(p.layer[0], stream); });
        run(RowOp::kResidualNorm, "residual_norm_modulate",
            [&](auto& p) { return lingbot::cuda::residual_norm_modulate(p.residual[0], stream); });
        run(RowOp::kCameraNorm, "gated_residual_camera_norm",
            [&](auto& p) { return lingbot::cuda::gated_residual_camera_norm(p.camera[0], stream); });
        run(RowOp::kGatedResidual, "gated_residual",
            [&](auto& p) { return lingbot::cuda::gated_residual(p.gated[0], stream); });
      }
    }
  }

  struct Table {
    RopeCosSinParams a;
    const double* ref;
    void poison() { check(cudaMemset(a.out, kPoison, a.num_tokens * a.head_dim * 4), "poison"); }
    void compare(Gate& g, Arena&) { g.rows<float>(a.out, a.head_dim, nullptr, ref, a.num_tokens, a.head_dim); }
  };

  void tables() {
    const int64_t shapes[][4] = {{4524, 0, 1508, 52},
                                 {4524, 999999 * int64_t{1508}, 1508, 52},
                                 {1131, 1508 * 7 + 1131, 1508, 52},
                                 {100, 3, 7, 3},
                                 {50, 5, 1, 1},
                                 {64, 10, 1000, 5000},
                                 {1, 12345, 100, 10},
                                 {333, 20, 77, 11},
                                 {90, 0, 1000000, 1000}};
    for (const auto& [tokens, start, stride, width] : shapes) {
      for (int head_dim : {128, 64, 256, 6, 2, 50, 80}) {
        for (int64_t offset : {0, 1}) {
          arena.reset();
          Table t = {
              {arena.take<float>(tokens * head_dim + offset) + offset, tokens, start, stride, width, head_dim, 10000.0},
              nullptr};
          t.ref = table_reference(arena, t.a);
          one("rope_cos_sin " + std::to_string(tokens) + " from " + std::to_string(start) + " head_dim " +
                  std::to_string(head_dim),
              t, 0.0, [&] { return lingbot::cuda::rope_cos_sin(t.a, stream); });
          if (gate.last.worst[1] > 6e-8)
            ++failed, std::printf("sweep: rope_cos_sin beyond 1 ulp: %.3g\n", gate.last.worst[1]);
        }
      }
    }
  }
};

inline int sweep(Arena& arena, Gate& gate, cudaStream_t stream, int every) {
  Sweep s = {arena, gate, stream, every};
  s.tables();
  s.norm_rope<__nv_bfloat16>();
  s.norm_rope<__half>();
  s.norm_rope<float>();
  s.outputs<__nv_bfloat16>();
  s.outputs<float>();
  s.merges<__nv_bfloat16>();
  s.merges<__half>();
  s.merges<float>();
  s.rows<__nv_bfloat16, __nv_bfloat16>();
  s.rows<__nv_bfloat16, float>();
  s.rows<__half, __half>();
  s.rows<__half, float>();
  s.rows<float, float>();
  std::printf("sweep: %d passed, %d failed\n", s.passed, s.failed);
  return s.failed;
}

}  // namespace tune
