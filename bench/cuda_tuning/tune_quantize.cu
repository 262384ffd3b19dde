// Times the launch variants of the quantising passes against copies of the same bytes, each behind a gate: the codes of
// the element-by-element kernel, which a norm's other order of sums may move by one step in one of a thousand.
//
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o tune_quantize bench/cuda_tuning/tune_quantize.cu
//   ./tune_quantize [--op NAME] [--variant NAME] [--dim 5120,13824] [--tokens 4524,1131] [--no-time]
//
// A row: op, shape, variant (threads x vectors, registers a thread), microseconds a launch in a replayed graph and
// between two events, and their ratios to cudaMemcpyAsync and (graph only) to a plain copy kernel.
#include "../../csrc/cuda/gated_residual_camera_norm_quantize.cu"
#include "../../csrc/cuda/layer_norm_modulate_quantize.cu"
#include "../../csrc/cuda/residual_norm_modulate_quantize.cu"
#include "../../csrc/cuda/rotate_quantize.cu"
#include "harness.cuh"

namespace tune {

using namespace lingbot;
using namespace lingbot::cuda;
using B = __nv_bfloat16;

struct Counts {
  unsigned long long far, near, unequal;  // codes apart by more than one, by one; scales or x_out unlike
};

__global__ void compare_codes(const int8_t* a, const int8_t* b, int64_t count, Counts* counts) {
  for (int64_t i = blockIdx.x * int64_t{256} + threadIdx.x; i < count; i += gridDim.x * int64_t{256}) {
    const int apart = a[i] > b[i] ? a[i] - b[i] : b[i] - a[i];
    if (apart) atomicAdd(apart > 1 ? &counts->far : &counts->near, 1ull);
  }
}

template <typename T>
__global__ void compare_values(const T* a, const T* b, int64_t count, float tolerance, Counts* counts) {
  for (int64_t i = blockIdx.x * int64_t{256} + threadIdx.x; i < count; i += gridDim.x * int64_t{256}) {
    const float x = to_float(a[i]), y = to_float(b[i]);
    if (!(fabsf(x - y) <= tolerance * fabsf(y))) atomicAdd(&counts->unequal, 1ull);  // a NaN is unlike all
  }
}

// Operand sets of one pass, and what its element-by-element kernel makes of the first.
template <typename Params>
struct Problem {
  Status (*shipped)(const Params&, void*);
  std::vector<Params> sets;
  QuantizedRows expected;
  B* expected_x = nullptr;
  int64_t rows, dim, width, bytes;
  double allowed;  // share of codes that may be one step off
};

struct Variant {
  std::string name;
  Run run;
};

Options options;
Arena *arena, *copies;  // of operands; of what is copied, which the copies overwrite
cudaStream_t stream;
int failures = 0;

QuantizedRows take_rows(int64_t rows, int64_t width, const int8_t* signs) {
  return {arena->take<int8_t>(rows * width + 1), arena->take<float>(rows), signs, 1};
}

const B* take_random(int64_t count, uint32_t seed) {
  B* p = arena->take<B>(count);
  randomise(p, count, seed, 0.3f, 1.f);
  return p;
}

Modulation take_modulation(int64_t dim, uint32_t seed) {
  float* p = arena->take<float>(dim);
  randomise(p, dim, seed, 0.1f, 0.4f);
  return {p, 0};
}

template <typename Params>
B* written_x(const Params& a) {
  if constexpr (std::is_same_v<Params, ResidualNormModulateQuantizeParams> ||
                std::is_same_v<Params, GatedResidualCameraNormQuantizeParams>)
    return static_cast<B*>(a.x_out);
  else return nullptr;
}

template <typename Params>
void set_written_x(Params& a, B* x_out) {
  if constexpr (std::is_same_v<Params, ResidualNormModulateQuantizeParams> ||
                std::is_same_v<Params, GatedResidualCameraNormQuantizeParams>)
    a.x_out = x_out;
}

// `make(set, out)` gives the operands of a set.
template <typename Params, typename Make>
Problem<Params> make_problem(Status (*shipped)(const Params&, void*), int64_t rows, int64_t dim, int64_t bytes_per_row,
                             double allowed, const Make& make) {
  const int64_t width = round_up(static_cast<int>(dim), kRotationBlock);
  Problem<Params> problem = {shipped, {}, {}, nullptr, rows, dim, width, rows * (bytes_per_row + width + 4), allowed};
  int8_t* signs = arena->take<int8_t>(width);
  std::vector<int8_t> host(width);
  for (int64_t i = 0; i < width; ++i) host[i] = i * 2654435761u >> 7 & 1 ? 1 : -1;
  check(cudaMemcpy(signs, host.data(), width, cudaMemcpyHostToDevice), "signs");
  const int sets = static_cast<int>(std::clamp<int64_t>(400'000'000 / problem.bytes + 1, 3, 12));
  for (int set = 0; set < sets; ++set) problem.sets.push_back(make(set, take_rows(rows, width, signs)));
  problem.expected = take_rows(rows, width, signs);
  Params by_element = problem.sets[0];
  by_element.out = problem.expected;
  by_element.out.codes += 1;  // no vectors: the element-by-element kernel
  problem.expected.codes += 1;
  if (written_x(by_element)) set_written_x(by_element, problem.expected_x = arena->take<B>(rows * dim));
  if (Status s = shipped(by_element, stream)) std::fprintf(stderr, "by element: %s\n", s), std::exit(1);
  check(cudaStreamSynchronize(stream), "by element");
  return problem;
}

template <typename Params>
bool gate_passes(const Problem<Params>& problem, const Run& run, Status* status) {
  static Counts* counts = nullptr;
  if (!counts) check(cudaMallocManaged(&counts, sizeof(Counts)), "counts");
  const QuantizedRows& out = problem.sets[0].out;
  const int64_t codes = problem.rows * problem.width;
  check(cudaMemset(out.codes, 0x80, codes), "poison");  // -128, which no code is
  check(cudaMemset(out.row_scale, kPoison, problem.rows * 4), "poison");
  B* x_out = written_x(problem.sets[0]);
  if (x_out) check(cudaMemset(x_out, kPoison, problem.rows * problem.dim * 2), "poison");
  *counts = {};
  check(cudaDeviceSynchronize(), "poison");
  if ((*status = run(0, stream))) return false;
  check(cudaStreamSynchronize(stream), "launch");
  compare_codes<<<1024, 256>>>(out.codes, problem.expected.codes, codes, counts);
  compare_values<<<64, 256>>>(out.row_scale, problem.expected.row_scale, problem.rows, problem.allowed ? 2e-5f : 0.f,
                              counts);
  if (x_out) compare_values<<<1024, 256>>>(x_out, problem.expected_x, problem.rows * problem.dim, 0.f, counts);
  check(cudaDeviceSynchronize(), "compare");
  const bool passed = !counts->far && !counts->unequal && counts->near <= problem.allowed * codes;
  if (!passed) std::printf("    far %llu, near %llu, unequal %llu\n", counts->far, counts->near, counts->unequal);
  return passed;
}

template <typename Params>
void time_variants(const char* op, const std::string& shape, const Problem<Params>& problem,
                   const std::vector<Variant>& variants) {
  const CopyTimes copy = options.time ? copy_times(*copies, problem.bytes, stream) : CopyTimes{};
  for (const Variant& v : variants) {
    if (!options.variant.empty() && v.name.find(options.variant) == std::string::npos) continue;
    Status s = nullptr;
    Times t;
    if (!gate_passes(problem, v.run, &s)) ++failures, s = s ? s : "WRONG";
    else if (options.time) s = time_run(v.run, static_cast<int>(problem.sets.size()), stream, &t);
    std::printf("%-36s %-16s %-16s %8.2f %8.2f  graph %.3f  single %.3f  kernel %.3f%s%s\n", op, shape.c_str(),
                v.name.c_str(), t.graph_us, t.single_us, t.graph_us / copy.memcpy.graph_us,
                t.single_us / copy.memcpy.single_us, t.graph_us / copy.kernel.graph_us, s ? "  " : "", s ? s : "");
    std::fflush(stdout);
  }
}

// The kernel of a pass with a shape and a plan, and what it is launched with.
template <typename Shape, typename Plan>
Status launch_pass(const RotateQuantizeParams& a, int threads, cudaStream_t s) {
  return launch(rotate_quantize_rows<B, Shape, Plan, true>, dim3(a.tokens), dim3(threads), 0, s, true,
                kernel_params(a, device_codes<true>(a.out, a.dim)));
}
template <typename Shape, typename Plan>
Status launch_pass(const LayerNormModulateQuantizeParams& a, int threads, cudaStream_t s) {
  return launch(layer_norm_rows<B, B, Shape, Plan, Codes<true>>, dim3(a.tokens), dim3(threads), 0, s, true,
                layer_norm_params(a, device_codes<true>(a.out, a.dim)));
}
template <typename Shape, typename Plan>
Status launch_pass(const ResidualNormModulateQuantizeParams& a, int threads, cudaStream_t s) {
  return launch(residual_norm_rows<B, B, Shape, Plan, Codes<true>>, dim3(a.tokens), dim3(threads), 0, s, true,
                residual_norm_params(a, device_codes<true>(a.out, a.dim)));
}
template <typename Shape, typename Plan>
Status launch_pass(const GatedResidualCameraNormQuantizeParams& a, int threads, cudaStream_t s) {
  const auto p = camera_norm_params(a, device_codes<true>(a.out, a.dim));
  const dim3 grid(a.tokens), block(threads);
  if (p.cam_scale) return launch(camera_norm_rows<B, B, Shape, Plan, true, Codes<true>>, grid, block, 0, s, true, p);
  return launch(camera_norm_rows<B, B, Shape, Plan, false, Codes<true>>, grid, block, 0, s, true, p);
}

template <typename Shape, int kRegisters, StoreHint kStore = StoreHint::kWriteBack, typename Params>
Variant variant(const std::string& name, const Problem<Params>& problem, int threads = Shape::kThreads) {
  using Plan = QuantizePlan<Shape, Codes<true>, kRegisters, kStore, B>;
  return {name, [&problem, threads](int set, cudaStream_t s) {
            return launch_pass<Shape, Plan>(problem.sets[set], threads, s);
          }};
}

template <typename Params>
void time_pass(const char* op, const std::string& shape, const Problem<Params>& problem) {
  std::vector<Variant> all = {
      {"shipped", [&](int set, cudaStream_t s) { return problem.shipped(problem.sets[set], s); }}};
  if (problem.dim == 5120) {
    all.push_back(variant<RotationShape<1, 640>, 48>("640x1 48", problem));
    all.push_back(variant<RotationShape<2, 320>, 40>("320x2 40", problem));
    all.push_back(variant<RotationShape<2, 320>, 48>("320x2 48", problem));
    all.push_back(variant<RotationShape<2, 320>, 48, StoreHint::kStream>("320x2 48 cs", problem));
    all.push_back(variant<RotationShape<2, 320>, 64>("320x2 64", problem));
    all.push_back(variant<RotationShape<4, 160>, 64>("160x4 64", problem));
    all.push_back(variant<RotationShape<4, 160>, 72>("160x4 72", problem));
    all.push_back(variant<RotationShape<4, 160>, 80>("160x4 80", problem));
    all.push_back(variant<RotationShape<4, 160>, 96>("160x4 96", problem));
  }
  if (problem.dim == 13824) {
    all.push_back(variant<RotationShape<2, 864>, 32>("864x2 32", problem));
    all.push_back(variant<RotationShape<2, 864>, 64>("864x2 64", problem));
    all.push_back(variant<RotationShape<4, 0>, 64>("448x4", problem, 448));
  }
  if (problem.dim == 1536) {
    all.push_back(variant<RotationShape<1, 192>, 48>("192x1 48", problem));
    all.push_back(variant<RotationShape<2, 96>, 48>("96x2 48", problem));
    all.push_back(variant<RotationShape<4, 0>, 64>("64x4", problem, 64));
  }
  time_variants(op, shape, problem, all);
}

void time_passes(int64_t tokens, int64_t dim) {
  const auto asked = [](const char* name) { return std::string(name).find(options.op) != std::string::npos; };
  const std::string shape = "S=" + std::to_string(tokens) + " D=" + std::to_string(dim);
  const int64_t n = tokens * dim;
  const int32_t d = static_cast<int32_t>(dim);
  constexpr Dtype kType = Dtype::kBFloat16;
  if (asked("rotate_quantize")) {
    arena->reset();
    time_pass("rotate_quantize", shape,
              make_problem<RotateQuantizeParams>(
                  lingbot::cuda::rotate_quantize, tokens, dim, 2 * dim, 0.0, [&](int set, const QuantizedRows& out) {
                    return RotateQuantizeParams{{take_random(n, 10 + set), n, dim}, out, 1, tokens, d, kType};
                  }));
  }
  if (dim > 5120) return;  // the norms are as wide as the model
  if (asked("layer_norm_modulate_quantize")) {
    arena->reset();
    const Modulation shift = take_modulation(dim, 1), scale = take_modulation(dim, 2);
    time_pass("layer_norm_modulate_quantize", shape,
              make_problem<LayerNormModulateQuantizeParams>(
                  lingbot::cuda::layer_norm_modulate_quantize, tokens, dim, 2 * dim, 1e-3,
                  [&](int set, const QuantizedRows& out) {
                    return LayerNormModulateQuantizeParams{
                        take_random(n, 10 + set), shift, scale, out, 1, tokens, d, kType, 1e-6f};
                  }));
  }
  if (asked("residual_norm_modulate_quantize")) {
    arena->reset();
    const Modulation shift = take_modulation(dim, 1), scale = take_modulation(dim, 2), gate = take_modulation(dim, 3);
    time_pass("residual_norm_modulate_quantize", shape,
              make_problem<ResidualNormModulateQuantizeParams>(
                  lingbot::cuda::residual_norm_modulate_quantize, tokens, dim, 6 * dim, 1e-3,
                  [&](int set, const QuantizedRows& out) {
                    return ResidualNormModulateQuantizeParams{take_random(n, 10 + set),
                                                              take_random(n, 30 + set),
                                                              gate,
                                                              shift,
                                                              scale,
                                                              arena->take<B>(n),
                                                              out,
                                                              1,
                                                              tokens,
                                                              d,
                                                              kType,
                                                              kType,
                                                              1e-6f};
                  }));
  }
  for (bool camera : {true, false}) {
    if (!asked("gated_residual_camera_norm_quantize")) break;
    arena->reset();
    const Modulation gate = take_modulation(dim, 3);
    const B *weight = take_random(dim, 4), *bias = take_random(dim, 5);
    time_pass("gated_residual_camera_norm_quantize", shape + (camera ? " camera" : ""),
              make_problem<GatedResidualCameraNormQuantizeParams>(
                  lingbot::cuda::gated_residual_camera_norm_quantize, tokens, dim, (camera ? 10 : 6) * dim, 1e-3,
                  [&](int set, const QuantizedRows& out) {
                    const B* cam_scale = camera ? take_random(n, 50 + set) : nullptr;
                    const B* cam_shift = camera ? take_random(n, 70 + set) : nullptr;
                    return GatedResidualCameraNormQuantizeParams{take_random(n, 10 + set),
                                                                 take_random(n, 30 + set),
                                                                 gate,
                                                                 cam_scale,
                                                                 cam_shift,
                                                                 weight,
                                                                 bias,
                                                                 arena->take<B>(n),
                                                                 out,
                                                                 1,
                                                                 tokens,
                                                                 d,
                                                                 kType,
                                                                 kType,
                                                                 1e-6f};
                  }));
  }
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
  options.dims = {5120, 13824, 1536};
  options.tokens = {4524, 2262, 1131};
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i];
    const char* value = i + 1 < argc ? argv[i + 1] : "";
    if (a == "--op") options.op = value, ++i;
    else if (a == "--variant") options.variant = value, ++i;
    else if (a == "--dim") options.dims = numbers(value), ++i;
    else if (a == "--tokens") options.tokens = numbers(value), ++i;
    else if (a == "--no-time") options.time = false;
    else return std::fprintf(stderr, "unknown argument %s\n", argv[i]), 2;
  }
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "properties");
  std::printf("%s, %d multiprocessors\n", properties.name, properties.multiProcessorCount);
  Arena operands(size_t{8} << 30), copied(size_t{2} << 30);
  arena = &operands, copies = &copied;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  for (int dim : options.dims) {
    for (int tokens : options.tokens) time_passes(tokens, dim);
  }
  std::printf("%d failed\n", failures);
  return failures != 0;
}

}  // namespace tune

int main(int argc, char** argv) { return tune::run(argc, argv); }
