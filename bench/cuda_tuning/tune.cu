// Times the launch variants of every CUDA kernel against copies of the same bytes, each behind a correctness gate.
//
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o tune bench/cuda_tuning/tune.cu
//   ./tune [--op NAME] [--variant NAME] [--dim 5120,1536] [--tokens 4524,1131] [--no-sweep] [--no-time]
//
// A row: op, shape, variant, microseconds a launch in a replayed graph and between two events, and their ratios to
// cudaMemcpyAsync and (graph only) to a plain copy kernel. `flips`: share of 16-bit elements unlike the rounded
// reference.
#include "../../csrc/cuda/gated_residual.cu"
#include "../../csrc/cuda/gated_residual_camera_norm.cu"
#include "../../csrc/cuda/layer_norm_modulate.cu"
#include "../../csrc/cuda/merge_segments.cu"
#include "../../csrc/cuda/qk_norm_rope_kv_write.cu"
#include "../../csrc/cuda/attention_output_push.cu"
#include "../../csrc/cuda/qk_norm_rope_pack.cu"
#include "../../csrc/cuda/qk_norm_rope_push.cu"
#include "../../csrc/cuda/qkv_unpack_kv_write.cu"
#include "../../csrc/cuda/residual_norm_modulate.cu"
#include "../../csrc/cuda/rms_norm.cu"
#include "../../csrc/cuda/rope_cos_sin.cu"
#include "row_cases.cuh"
#include "sweep.cuh"

namespace tune {

using B = __nv_bfloat16;
constexpr LoadHint NA = LoadHint::kNoAllocate;
constexpr StoreHint WB = StoreHint::kWriteBack, CS = StoreHint::kStream;

struct Variant {
  std::string name;
  Run run;
};

Options options;
Arena* arena;
Gate* gate;
cudaStream_t stream;
DeviceInfo device;
int failures = 0;

bool wanted(const std::string& variant) {
  return options.variant.empty() || variant.find(options.variant) != std::string::npos;
}

template <typename Problem>
void time_variants(const char* op, const std::string& shape, Problem& problem, int sets, const CopyTimes& copy,
                   const std::vector<Variant>& variants) {
  std::printf("%-26s %-22s %-26s %8.2f %8.2f\n", op, shape.c_str(), "memcpy", copy.memcpy.graph_us,
              copy.memcpy.single_us);
  std::printf("%-26s %-22s %-26s %8.2f %8.2f\n", op, shape.c_str(), "copy kernel", copy.kernel.graph_us,
              copy.kernel.single_us);
  for (const Variant& v : variants) {
    if (!wanted(v.name)) continue;
    problem.poison();
    gate->clear();
    check(cudaDeviceSynchronize(), "poison");
    Status s = v.run(0, stream);
    check(cudaStreamSynchronize(stream), v.name.c_str());
    Times t;
    if (!s) {
      problem.compare(*gate, *arena);
      if (!gate->passed()) ++failures, s = "WRONG";
    }
    if (!s && options.time) s = time_run(v.run, sets, stream, &t);
    std::printf("%-26s %-22s %-26s %8.2f %8.2f  graph %.3f  single %.3f  kernel %.3f  flips %.1e%s%s\n", op,
                shape.c_str(), v.name.c_str(), t.graph_us, t.single_us, t.graph_us / copy.memcpy.graph_us,
                t.single_us / copy.memcpy.single_us, t.graph_us / copy.kernel.graph_us, gate->wrong_share(),
                s ? "  " : "", s ? s : "");
    if (s && gate->last.not_finite + gate->last.touched + gate->last.wrong_bits > 0) {
      std::printf("    not finite %llu, touched %llu, unequal %llu, worst %.3g %.3g\n", gate->last.not_finite,
                  gate->last.touched, gate->last.wrong_bits, gate->last.worst[0], gate->last.worst[1]);
    }
    std::fflush(stdout);
  }
}

int sets_for(int64_t bytes) { return static_cast<int>(std::clamp<int64_t>(400'000'000 / bytes + 1, 3, 12)); }

std::string shape_name(int64_t tokens, int64_t dim, const char* extra = "") {
  return "S=" + std::to_string(tokens) + " D=" + std::to_string(dim) + extra;
}

template <NormRopeTo kTo>
using NormRopeSets = std::vector<NormRopeParamsOf<kTo>>;

template <int kVecs, int kThreads, int kMinBlocks, LoadHint kLoad = NA, StoreHint kStore = WB,
          NormRopeTo kTo = NormRopeTo::kRows>
Run rows_variant(const NormRopeSets<kTo>& sets) {
  return [=](int set, cudaStream_t s) {
    const NormRopeParamsOf<kTo>& p = sets[set];
    return launch(norm_rope_rows<B, 8, kVecs, kThreads, kMinBlocks, kTo, kLoad, kStore>, dim3(p.tokens * p.parts),
                  dim3(kThreads), 0, s, true, p);
  };
}

template <NormRopeTo kTo>
std::vector<Variant> norm_rope_variants(const NormRopeSets<kTo>& s) {
  switch (s[0].dim) {
    case 5120:
      return {{"rows_160x4", rows_variant<4, 160, 8, NA, WB, kTo>(s)},
              {"rows_160x4_cs", rows_variant<4, 160, 8, NA, CS, kTo>(s)},
              {"rows_320x2", rows_variant<2, 320, 4, NA, WB, kTo>(s)},
              {"rows_320x2_cs", rows_variant<2, 320, 4, NA, CS, kTo>(s)},
              {"rows_128x5_cs", rows_variant<5, 128, 8, NA, CS, kTo>(s)}};
    case 3072:
      return {{"rows_192x2", rows_variant<2, 192, 6, NA, WB, kTo>(s)},
              {"rows_192x2_cs", rows_variant<2, 192, 6, NA, CS, kTo>(s)},
              {"rows_128x3_cs", rows_variant<3, 128, 8, NA, CS, kTo>(s)},
              {"rows_96x4", rows_variant<4, 96, 1, NA, WB, kTo>(s)},
              {"rows_96x4_cs", rows_variant<4, 96, 1, NA, CS, kTo>(s)}};
    case 1536:
      return {{"rows_96x2", rows_variant<2, 96, 1, NA, WB, kTo>(s)},
              {"rows_96x2_cs", rows_variant<2, 96, 1, NA, CS, kTo>(s)},
              {"rows_64x3_cs", rows_variant<3, 64, 1, NA, CS, kTo>(s)}};
  }
  return {};
}

void time_norm_rope(int64_t tokens, int64_t dim, bool q) {
  arena->reset();
  NormRopeCase c;
  c.tokens = tokens, c.head_dim = 128, c.heads = dim / 128, c.has_q = q;
  c.sink = 3 * 1560, c.capacity = c.sink + tokens + 1000, c.chunk_start = c.sink + 400;
  const int64_t bytes = 2 * c.parts() * tokens * dim * 2;
  const CopyTimes copy = copy_times(*arena, bytes, stream);
  const int sets = sets_for(bytes);
  NormRopeProblem<B> problem(*arena, c, sets, 1000);
  NormRopeSets<NormRopeTo::kRows> params;
  for (const auto& a : problem.write) params.push_back(kernel_params(a));
  std::vector<Variant> variants = {{"shipped", [&](int set, cudaStream_t s) {
                                      return lingbot::cuda::qk_norm_rope_kv_write(problem.write[set], s);
                                    }}};
  for (const Variant& v : norm_rope_variants<NormRopeTo::kRows>(params)) variants.push_back(v);
  time_variants(q ? "qk_norm_rope_kv_write" : "k_norm_rope_kv_write", shape_name(tokens, dim), problem, sets, copy,
                variants);
}

void time_pack(int64_t tokens, int64_t dim) {
  arena->reset();
  NormRopeCase c;
  c.tokens = tokens, c.head_dim = 128, c.heads = dim / 128, c.ranks = 4;
  const int64_t bytes = 6 * tokens * dim * 2;
  const CopyTimes copy = copy_times(*arena, bytes, stream);
  const int sets = sets_for(bytes);
  NormRopeProblem<B> problem(*arena, c, sets, 2000);
  NormRopeSets<NormRopeTo::kGroups> params;
  for (const auto& a : problem.pack) params.push_back(kernel_params(a));
  std::vector<Variant> variants = {{"shipped", [&](int set, cudaStream_t s) {
                                      return lingbot::cuda::qk_norm_rope_pack(problem.pack[set], s);
                                    }}};
  for (const Variant& v : norm_rope_variants<NormRopeTo::kGroups>(params)) variants.push_back(v);
  time_variants("qk_norm_rope_pack", shape_name(tokens, dim), problem, sets, copy, variants);
}

template <int kTokens, LoadHint kLoad = NA, StoreHint kStore = WB>
Run unpack_variant(const std::vector<QkvUnpackKvWriteParams>& sets, int threads, int rows) {
  return [=](int set, cudaStream_t s) {
    const UnpackParams p = kernel_params(sets[set], 8);
    const dim3 grid(static_cast<unsigned>(ceil_div(p.tokens, kTokens * rows)));
    return launch(unpack_to_ring<uint4, kTokens, kLoad, kStore>, grid, dim3(threads, rows), 0, s, true, p);
  };
}

// `ranks`: that share the heads.
void time_unpack(int64_t tokens, int64_t dim, int ranks) {
  arena->reset();
  const int64_t heads = dim / 128 / ranks, bytes = 4 * tokens * heads * 128 * 2;
  const CopyTimes copy = copy_times(*arena, bytes, stream);
  const int sets = sets_for(bytes);
  UnpackProblem<B> problem(*arena, 1, tokens, heads, 128, 3, 0, 5000, 1560, 1560 + tokens + 1000, sets, 3000);
  const int words = static_cast<int>(heads * 16), whole = std::min(512, round_up(words, 32));
  const auto& p = problem.params;
  const std::string shape = shape_name(tokens, dim, (" P=" + std::to_string(ranks)).c_str());
  std::vector<Variant> variants = {
      {"shipped", [&](int set, cudaStream_t s) { return lingbot::cuda::qkv_unpack_kv_write(p[set], s); }},
      {"1_token", unpack_variant<1>(p, whole, 1)},
      {"2_tokens", unpack_variant<2>(p, whole, 1)},
      {"1_token_cs", unpack_variant<1, NA, CS>(p, whole, 1)},
      {"2_tokens_cs", unpack_variant<2, NA, CS>(p, whole, 1)}};
  if (whole <= 256) variants.push_back({"1_token_by2", unpack_variant<1>(p, whole, 2)});
  if (words % 160 == 0 && words > 160) {
    variants.push_back({"1_token_160", unpack_variant<1>(p, 160, 1)});
    variants.push_back({"1_token_320", unpack_variant<1>(p, 320, 1)});
  }
  time_variants("qkv_unpack_kv_write", shape, problem, sets, copy, variants);
}

// A kernel over rows, `rows` rows a block.
template <typename Kernel, typename Params>
Run row_variant(Kernel kernel, const std::vector<Params>& sets, int threads, int rows = 1) {
  return [=](int set, cudaStream_t s) {
    const auto p = kernel_params(sets[set]);
    const unsigned grid = static_cast<unsigned>(ceil_div(p.tokens, rows));
    return launch(kernel, dim3(grid), dim3(threads), 0, s, true, p);
  };
}

constexpr ChannelLoad LATE = ChannelLoad::kLate, KEPT = ChannelLoad::kKept, AHEAD = ChannelLoad::kAhead;
constexpr Statistics TWO = Statistics::kTwoPass, MERGED = Statistics::kMerged;

// `launched` gives the Run of a kernel with a shape and a plan; widths of 5120.
template <typename R, typename Launched>
std::vector<Variant> row_variants(const Launched& launched) {
  if constexpr (sizeof(R) == 4) {
    using W640 = RowShape<4, 2, 640>;
    using W320 = RowShape<4, 4, 320>;
    return {{"640x2", launched(W640{}, RowPlan<>{})},
            {"320x4", launched(W320{}, RowPlan<>{})},
            {"320x4_cs", launched(W320{}, RowPlan<1, 1, LATE, TWO, NA, CS>{})},
            {"320x4_kept", launched(W320{}, RowPlan<1, 1, KEPT>{})},
            {"320x4_merged", launched(W320{}, RowPlan<1, 1, LATE, MERGED>{})}};
  } else {
    using W640 = RowShape<8, 1, 640>;
    using W320 = RowShape<8, 2, 320>;
    using W160 = RowShape<8, 4, 160>;
    using W128 = RowShape<8, 5, 128>;
    return {{"640x1", launched(W640{}, RowPlan<>{})},
            {"320x2", launched(W320{}, RowPlan<>{})},
            {"320x2_cs", launched(W320{}, RowPlan<1, 1, LATE, TWO, NA, CS>{})},
            {"320x2_kept", launched(W320{}, RowPlan<1, 1, KEPT>{})},
            {"320x2_ahead", launched(W320{}, RowPlan<1, 1, AHEAD>{})},
            {"320x2_merged", launched(W320{}, RowPlan<1, 1, LATE, MERGED>{})},
            {"320x2_kept_merged", launched(W320{}, RowPlan<1, 1, KEPT, MERGED>{})},
            {"320x2_kept_merged_cs", launched(W320{}, RowPlan<1, 1, KEPT, MERGED, NA, CS>{})},
            {"320x2_rows2", launched(W320{}, RowPlan<1, 2>{})},
            {"640x1_rows2", launched(W640{}, RowPlan<1, 2>{})},
            {"640x1_rows2_merged", launched(W640{}, RowPlan<1, 2, LATE, MERGED>{})},
            {"160x4", launched(W160{}, RowPlan<>{})},
            {"160x4_min7", launched(W160{}, RowPlan<7>{})},
            {"160x4_kept", launched(W160{}, RowPlan<1, 1, KEPT>{})},
            {"160x4_merged", launched(W160{}, RowPlan<1, 1, LATE, MERGED>{})},
            {"128x5", launched(W128{}, RowPlan<>{})}};
  }
}

template <typename R>
std::vector<Variant> variants_of(const std::vector<LayerNormModulateParams>& sets) {
  std::vector<Variant> all = row_variants<R>([&](auto shape, auto plan) {
    using Shape = decltype(shape);
    using Plan = decltype(plan);
    return row_variant(layer_norm_rows<B, R, Shape, Plan>, sets, Shape::kThreads, Plan::kRows);
  });
  if constexpr (sizeof(R) == 2) {
    all.push_back({"320x2_steps", [=](int set, cudaStream_t s) {
                     const auto p = kernel_params(sets[set]);
                     const unsigned most = static_cast<unsigned>(kLayerNormSteps * device.multiprocessors);
                     return launch(layer_norm_steps<B, R, RowShape<8, 2, 320>, kLayerNormSteps>,
                                   dim3(std::min(p.tokens, most)), dim3(320), 0, s, true, p);
                   }});
  }
  return all;
}

template <typename R>
std::vector<Variant> variants_of(const std::vector<ResidualNormModulateParams>& sets) {
  return row_variants<R>([&](auto shape, auto plan) {
    using Shape = decltype(shape);
    using Plan = decltype(plan);
    return row_variant(residual_norm_rows<B, R, Shape, Plan>, sets, Shape::kThreads, Plan::kRows);
  });
}

template <typename R>
std::vector<Variant> variants_of(const std::vector<GatedResidualCameraNormParams>& sets) {
  return row_variants<R>([&](auto shape, auto plan) {
    using Shape = decltype(shape);
    using Plan = decltype(plan);
    if (sets[0].cam_scale)
      return row_variant(camera_norm_rows<B, R, Shape, Plan, true>, sets, Shape::kThreads, Plan::kRows);
    return row_variant(camera_norm_rows<B, R, Shape, Plan, false>, sets, Shape::kThreads, Plan::kRows);
  });
}

#define RMS_VARIANT(name, vecs, threads, min_blocks, load, store) \
  {name, row_variant(rms_norm_rows<B, 8, vecs, threads, min_blocks, load, store>, sets, threads)}

template <typename R>
std::vector<Variant> variants_of(const std::vector<RmsNormParams>& sets) {
  return {RMS_VARIANT("320x2", 2, 320, 1, NA, WB),    RMS_VARIANT("160x4", 4, 160, 1, NA, WB),
          RMS_VARIANT("160x4_cs", 4, 160, 1, NA, CS),
          RMS_VARIANT("128x5", 5, 128, 1, NA, WB),    RMS_VARIANT("128x5_cs", 5, 128, 1, NA, CS)};
}

template <typename R, int kRows, LoadHint kLoad = NA, StoreHint kStore = WB>
Run columns_variant(const std::vector<GatedResidualParams>& sets, int threads) {
  return [=](int set, cudaStream_t s) {
    constexpr int V = kVectorElements<B, R>;
    const GatedResidualKernelParams p = kernel_params(sets[set]);
    const dim3 grid(static_cast<unsigned>(ceil_div(p.dim / V, threads)),
                    static_cast<unsigned>(ceil_div(p.tokens, kRows)));
    return launch(gated_residual_columns<B, R, V, kRows, kLoad, kStore>, grid, dim3(threads), 0, s, true, p);
  };
}

template <typename R>
std::vector<Variant> variants_of(const std::vector<GatedResidualParams>& sets) {
  return {{"1_row_128", columns_variant<R, 1>(sets, 128)},
          {"1_row_160", columns_variant<R, 1>(sets, 160)},
          {"1_row_256", columns_variant<R, 1>(sets, 256)},
          {"1_row_160_cs", columns_variant<R, 1, NA, CS>(sets, 160)},
          {"2_rows_160", columns_variant<R, 2>(sets, 160)},
          {"4_rows_160", columns_variant<R, 4>(sets, 160)}};
}

template <typename R, typename Params>
void time_row_op(RowOp op, const char* name, std::vector<Params> RowProblem<B, R>::* sets_of,
                 Status (*shipped)(const Params&, void*), int64_t tokens, int64_t dim, bool camera = true) {
  if (std::string(name).find(options.op) == std::string::npos) return;
  arena->reset();
  RowCase c;
  c.op = op, c.tokens = tokens, c.dim = dim, c.camera = camera;
  const int64_t bytes = RowProblem<B, R>::bytes_of(c);
  const CopyTimes copy = copy_times(*arena, bytes, stream);
  const int sets = sets_for(bytes);
  RowProblem<B, R> problem(*arena, c, sets, 4000);
  const std::vector<Params>& params = problem.*sets_of;
  std::vector<Variant> variants = {{"shipped", [&](int set, cudaStream_t s) { return shipped(params[set], s); }}};
  if (dim == 5120) {
    for (const Variant& v : variants_of<R>(params)) variants.push_back(v);
  }
  const std::string extra = std::string(sizeof(R) == 4 ? " R=f32" : "") + (camera ? "" : " no camera");
  time_variants(name, shape_name(tokens, dim, extra.c_str()), problem, sets, copy, variants);
}

template <typename R>
void time_row_ops(int64_t tokens, int64_t dim) {
  using Problem = RowProblem<B, R>;
  if constexpr (sizeof(R) == 2)
    time_row_op<R>(RowOp::kRmsNorm, "rms_norm", &Problem::rms, lingbot::cuda::rms_norm, tokens, dim);
  time_row_op<R>(RowOp::kLayerNorm, "layer_norm_modulate", &Problem::layer, lingbot::cuda::layer_norm_modulate, tokens,
                 dim);
  time_row_op<R>(RowOp::kResidualNorm, "residual_norm_modulate", &Problem::residual,
                 lingbot::cuda::residual_norm_modulate, tokens, dim);
  time_row_op<R>(RowOp::kCameraNorm, "gated_residual_camera_norm", &Problem::camera,
                 lingbot::cuda::gated_residual_camera_norm, tokens, dim);
  time_row_op<R>(RowOp::kCameraNorm, "gated_residual_camera_norm", &Problem::camera,
                 lingbot::cuda::gated_residual_camera_norm, tokens, dim, false);
  time_row_op<R>(RowOp::kGatedResidual, "gated_residual", &Problem::gated, lingbot::cuda::gated_residual, tokens, dim);
}

template <int kThreads, int kRows, int kColumns>
Run table_variant(const std::vector<RopeCosSinParams>& sets) {
  return [=](int set, cudaStream_t s) {
    RopeTableParams p;
    unsigned blocks;
    if (Status e = rope_table_params(sets[set], kRows, kColumns, &p, &blocks)) return e;
    return launch(rope_table<kThreads, kRows, kColumns, 4>, dim3(blocks), dim3(kThreads), 0, s, true, p);
  };
}

struct TableProblem {
  std::vector<RopeCosSinParams> sets;
  double* ref;

  void poison() { check(cudaMemset(sets[0].out, kPoison, sets[0].num_tokens * sets[0].head_dim * 4), "poison"); }
  void compare(Gate& g, Arena&) {
    g.rows<float>(sets[0].out, sets[0].head_dim, nullptr, ref, sets[0].num_tokens, sets[0].head_dim);
  }
};

void time_table(int64_t tokens) {
  if (std::string("rope_cos_sin").find(options.op) == std::string::npos) return;
  arena->reset();
  const RopeCosSinParams a = {nullptr, tokens, 300 * 1508 + 17, 1508, 52, 128, 10000.0};
  const CopyTimes copy = copy_times(*arena, tokens * 128 * 4, stream);
  TableProblem problem;
  for (int s = 0; s < 12; ++s) problem.sets.push_back(a), problem.sets.back().out = arena->take<float>(tokens * 128);
  problem.ref = table_reference(*arena, a);
  const auto& p = problem.sets;
  time_variants("rope_cos_sin", shape_name(tokens, 128), problem, 12, copy,
                {{"shipped", [&](int set, cudaStream_t s) { return lingbot::cuda::rope_cos_sin(p[set], s); }},
                 {"288_4x8", table_variant<288, 4, 8>(p)},
                 {"512_4x8", table_variant<512, 4, 8>(p)},
                 {"384_4x8", table_variant<384, 4, 8>(p)},
                 {"192_4x4", table_variant<192, 4, 4>(p)},
                 {"256_4x4", table_variant<256, 4, 4>(p)},
                 {"768_4x13", table_variant<768, 4, 13>(p)}});
}

std::vector<int> numbers(const char* text) {
  std::vector<int> out;
  for (char* at = const_cast<char*>(text); *at;) {
    out.push_back(static_cast<int>(std::strtol(at, &at, 10)));
    if (*at == ',') ++at;
  }
  return out;
}

int run(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i];
    const char* value = i + 1 < argc ? argv[i + 1] : "";
    if (a == "--op") options.op = value, ++i;
    else if (a == "--variant") options.variant = value, ++i;
    else if (a == "--dim") options.dims = numbers(value), ++i;
    else if (a == "--tokens") options.tokens = numbers(value), ++i;
    else if (a == "--sweep-every") options.sweep_every = std::max(1, std::atoi(value)), ++i;
    else if (a == "--no-sweep") options.sweep = false;
    else if (a == "--no-time") options.time = false;
    else return std::fprintf(stderr, "unknown argument %s\n", argv[i]), 2;
  }
  if (Status s = device_info(&device)) return std::fprintf(stderr, "%s\n", s), 1;
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "properties");
  std::printf("%s, %d multiprocessors, L2 %d MB\n", properties.name, device.multiprocessors,
              properties.l2CacheSize >> 20);
  Arena memory(size_t{8} << 30);
  Gate comparison;
  arena = &memory, gate = &comparison;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  if (options.sweep) failures += sweep(*arena, *gate, stream, options.sweep_every);
  const auto asked = [](const char* name) { return std::string(name).find(options.op) != std::string::npos; };
  if (options.time) {
    for (int tokens : options.tokens) time_table(tokens);
    for (int dim : options.dims) {
      for (int tokens : options.tokens) {
        if (asked("qk_norm_rope_kv_write")) time_norm_rope(tokens, dim, true);
        if (asked("k_norm_rope_kv_write")) time_norm_rope(tokens, dim, false);
        if (asked("qk_norm_rope_pack")) time_pack(tokens, dim);
        if (asked("qkv_unpack_kv_write")) time_unpack(tokens, dim, 4), time_unpack(tokens, dim, 1);
        time_row_ops<B>(tokens, dim);
        if (dim == 5120) time_row_ops<float>(tokens, dim);
      }
    }
  }
  std::printf("%d failed\n", failures);
  return failures != 0;
}

}  // namespace tune

int main(int argc, char** argv) { return tune::run(argc, argv); }
