// lingbot_kernels._C: every op on one page. A function takes its struct's fields positionally in declaration order,
// nested structs flattened, pointers as ints (0: null), a Dtype as int; then `threads` (cpu) or `stream` (cuda).
// Calls go through METH_FASTCALL: with some forty ints a call, a generic argument converter would cost more than a
// kernel.
#include <pybind11/pybind11.h>

#include <climits>
#include <exception>
#include <string>
#include <vector>

#include "build_info.h"  // written by CMake: version, CUDA architectures
#include "call_table.h"
#include "cpu/ops.h"
#include "params.h"

namespace py = pybind11;

namespace lingbot {
namespace {

#define FIELDS(...) visit(#__VA_ARGS__, __VA_ARGS__)

template <class V> void fields(V& visit, Rows& p) { FIELDS(p.ptr, p.batch_stride, p.token_stride); }
template <class V> void fields(V& visit, OutRows& p) { FIELDS(p.ptr, p.batch_stride, p.token_stride, p.group_stride); }
template <class V> void fields(V& visit, Ring& p) { FIELDS(p.chunk_start, p.cursor, p.sink, p.capacity); }
template <class V> void fields(V& visit, Cache& p) { FIELDS(p.ptr, p.batch_stride, p.token_stride); }
template <class V> void fields(V& visit, Modulation& p) { FIELDS(p.ptr, p.batch_stride); }
template <class V> void fields(V& visit, QuantizedRows& p) { FIELDS(p.codes, p.row_scale, p.signs, p.rotate); }

template <class V> void fields(V& visit, RopeCosSinParams& p) {
  FIELDS(p.out, p.num_tokens, p.token_start, p.frame_stride, p.width, p.head_dim, p.theta);
}
template <class V> void fields(V& visit, QkNormRopeKvWriteParams& p) {
  FIELDS(p.q, p.k, p.v, p.q_weight, p.k_weight, p.cos_sin, p.q_out, p.k_cache, p.v_cache, p.ring, p.batch, p.tokens,
         p.heads, p.head_dim, p.dtype, p.eps);
}
template <class V> void fields(V& visit, QkNormRopeQuantizeKvWriteParams& p) {
  FIELDS(p.q, p.k, p.v, p.q_weight, p.k_weight, p.cos_sin, p.q_codes, p.q_scale, p.k_cache, p.k_scale,
         p.k_scale_batch_stride, p.k_scale_token_stride, p.k_scale_head_stride, p.v_cache, p.ring, p.batch, p.tokens,
         p.heads, p.head_dim, p.dtype, p.eps);
}
template <class V> void fields(V& visit, QkNormRopePackParams& p) {
  FIELDS(p.q, p.k, p.v, p.q_weight, p.k_weight, p.cos_sin, p.out, p.batch, p.tokens, p.heads, p.head_dim, p.ranks,
         p.dtype, p.eps);
}
template <class V> void fields(V& visit, QkvUnpackKvWriteParams& p) {
  FIELDS(p.packed, p.parts, p.k_cache, p.v_cache, p.ring, p.batch, p.tokens, p.heads, p.head_dim, p.dtype);
}
template <class V> void fields(V& visit, QkNormRopePushParams& p) {
  FIELDS(p.q, p.k, p.v, p.q_weight, p.k_weight, p.cos_sin, p.addresses, p.q_out_batch_stride, p.q_out_token_stride,
         p.k_cache_batch_stride, p.k_cache_token_stride, p.v_cache_batch_stride, p.v_cache_token_stride, p.ring,
         p.first_token, p.batch, p.tokens, p.heads, p.head_dim, p.ranks, p.dtype, p.eps);
}
template <class V> void fields(V& visit, QkNormRopeQuantizePushParams& p) {
  FIELDS(p.q, p.k, p.v, p.q_weight, p.k_weight, p.cos_sin, p.addresses, p.q_out_batch_stride, p.q_out_token_stride,
         p.q_scale_batch_stride, p.q_scale_token_stride, p.q_scale_head_stride, p.k_cache_batch_stride,
         p.k_cache_token_stride, p.k_scale_batch_stride, p.k_scale_token_stride, p.k_scale_head_stride,
         p.v_cache_batch_stride, p.v_cache_token_stride, p.ring, p.first_token, p.batch, p.tokens, p.heads, p.head_dim,
         p.ranks, p.dtype, p.eps);
}
template <class V> void fields(V& visit, AttentionOutputPushParams& p) {
  FIELDS(p.attended, p.addresses, p.ends, p.batch_strides, p.token_stride, p.column, p.batch, p.tokens, p.width,
         p.ranks, p.dtype);
}
template <class V> void fields(V& visit, MergeSegmentsParams& p) {
  FIELDS(p.segments, p.segment_stride, p.batch_stride, p.token_stride, p.lse, p.lse_segment_stride, p.lse_batch_stride,
         p.lse_head_stride, p.out, p.batch, p.tokens, p.count, p.heads, p.head_dim, p.dtype);
}
template <class V> void fields(V& visit, Int8AttentionParams& p) {
  FIELDS(p.q, p.q_scale, p.q_scale_batch_stride, p.q_scale_token_stride, p.q_scale_head_stride, p.k_cache, p.k_scale,
         p.k_scale_batch_stride, p.k_scale_token_stride, p.k_scale_head_stride, p.v_cache, p.out, p.lse, p.workspace,
         p.workspace_bytes, p.batch, p.queries, p.keys, p.heads, p.head_dim, p.softmax_scale, p.last_key_count);
}
template <class V> void fields(V& visit, RmsNormParams& p) {
  FIELDS(p.x, p.weight, p.y, p.batch, p.tokens, p.dim, p.dtype, p.eps);
}
template <class V> void fields(V& visit, LayerNormModulateParams& p) {
  FIELDS(p.x, p.shift, p.scale, p.y, p.batch, p.tokens, p.dim, p.residual_dtype, p.dtype, p.eps);
}
template <class V> void fields(V& visit, ResidualNormModulateParams& p) {
  FIELDS(p.x, p.delta, p.gate, p.shift, p.scale, p.x_out, p.y, p.batch, p.tokens, p.dim, p.residual_dtype, p.dtype,
         p.eps);
}
template <class V> void fields(V& visit, GatedResidualCameraNormParams& p) {
  FIELDS(p.x, p.delta, p.gate, p.cam_scale, p.cam_shift, p.weight, p.bias, p.x_out, p.y, p.batch, p.tokens, p.dim,
         p.residual_dtype, p.dtype, p.eps);
}
template <class V> void fields(V& visit, GatedResidualParams& p) {
  FIELDS(p.x, p.delta, p.gate, p.x_out, p.batch, p.tokens, p.dim, p.residual_dtype, p.dtype);
}

template <class V> void fields(V& visit, RotateQuantizeParams& p) {
  FIELDS(p.x, p.out, p.batch, p.tokens, p.dim, p.dtype);
}
template <class V> void fields(V& visit, LayerNormModulateQuantizeParams& p) {
  FIELDS(p.x, p.shift, p.scale, p.out, p.batch, p.tokens, p.dim, p.residual_dtype, p.eps);
}
template <class V> void fields(V& visit, ResidualNormModulateQuantizeParams& p) {
  FIELDS(p.x, p.delta, p.gate, p.shift, p.scale, p.x_out, p.out, p.batch, p.tokens, p.dim, p.residual_dtype, p.dtype,
         p.eps);
}
template <class V> void fields(V& visit, GatedResidualCameraNormQuantizeParams& p) {
  FIELDS(p.x, p.delta, p.gate, p.cam_scale, p.cam_shift, p.weight, p.bias, p.x_out, p.out, p.batch, p.tokens, p.dim,
         p.residual_dtype, p.dtype, p.eps);
}
template <class V> void fields(V& visit, Int8LinearParams& p) {
  FIELDS(p.x, p.x_scale, p.w, p.w_scale, p.bias, p.y, p.rows, p.inputs, p.outputs, p.gelu, p.bias_dtype, p.dtype);
}

#define LINGBOT_OPS(X, backend)               \
  X(backend, rope_cos_sin)                    \
  X(backend, qk_norm_rope_kv_write)           \
  X(backend, qk_norm_rope_quantize_kv_write)  \
  X(backend, qk_norm_rope_pack)               \
  X(backend, qkv_unpack_kv_write)             \
  X(backend, qk_norm_rope_push)               \
  X(backend, qk_norm_rope_quantize_push)      \
  X(backend, attention_output_push)           \
  X(backend, merge_segments)                  \
  X(backend, int8_attention)                  \
  X(backend, rms_norm)                        \
  X(backend, layer_norm_modulate)             \
  X(backend, residual_norm_modulate)          \
  X(backend, gated_residual_camera_norm)      \
  X(backend, gated_residual)                  \
  X(backend, rotate_quantize)                 \
  X(backend, layer_norm_modulate_quantize)    \
  X(backend, residual_norm_modulate_quantize) \
  X(backend, gated_residual_camera_norm_quantize)

#define LINGBOT_CPU_OPS_ALONE(X) X(cpu, int8_linear)

template <class P> constexpr bool is_struct = std::is_class_v<P>;

// Names of the flattened fields, "q.ptr" for a nested one: the docstring, and what errors call an argument.
struct Names {
  std::string prefix;
  std::vector<std::string> names;

  template <class... F>
  void operator()(const char* text, F&... field) {
    (next(text, field), ...);
  }

 private:
  template <class F>
  void next(const char*& text, F& field) {
    text += std::string(text).find("p.") + 2;
    const size_t length = std::string(text).find_first_of(", ");
    const std::string name = prefix + std::string(text).substr(0, length);
    text += std::string(text).substr(0, length).size();
    if constexpr (is_struct<F>) {
      Names inner{name + ".", {}};
      fields(inner, field);
      names.insert(names.end(), inner.names.begin(), inner.names.end());
    } else {
      names.push_back(name);
    }
  }
};

template <class P>
std::vector<std::string> names_of() {
  P params{};
  Names visit{"", {}};
  fields(visit, params);
  return visit.names;
}

// Reads the arguments of a call in order; after the first that does not fit, a Python error is set and `at` stays on
// it.
struct Reader {
  PyObject* const* args;
  int at = 0;
  bool ok = true;

  template <class... F>
  void operator()(const char*, F&... field) {
    ((ok && (next(field), true)), ...);
  }

  template <class F>
  void next(F& field) {
    if constexpr (is_struct<F>) {
      fields(*this, field);
    } else {
      ok = read(args[at], field);
      at += ok;
    }
  }

 private:
  static bool read(PyObject* arg, int64_t& value) {
    value = PyLong_AsLongLong(arg);
    return value != -1 || !PyErr_Occurred();
  }
  static bool read(PyObject* arg, int32_t& value) {
    int64_t wide;
    if (!read(arg, wide)) return false;
    value = static_cast<int32_t>(wide);
    if (wide == value) return true;
    PyErr_SetString(PyExc_OverflowError, "must fit in 32 bits");
    return false;
  }
  static bool read(PyObject* arg, Dtype& value) {
    int64_t code;
    if (!read(arg, code)) return false;
    value = static_cast<Dtype>(code);
    if (code >= 0 && code <= 2) return true;
    PyErr_SetString(PyExc_ValueError, "must be 0 (float32), 1 (float16) or 2 (bfloat16)");
    return false;
  }
  static bool read(PyObject* arg, double& value) {
    value = PyFloat_AsDouble(arg);
    return value != -1.0 || !PyErr_Occurred();
  }
  static bool read(PyObject* arg, float& value) {
    double wide;
    if (!read(arg, wide)) return false;
    value = static_cast<float>(wide);
    return true;
  }
  template <class T>
  static bool read(PyObject* arg, T*& value) {
    value = static_cast<T*>(PyLong_AsVoidPtr(arg));
    return value != nullptr || !PyErr_Occurred();
  }
};

// Puts the argument's name before the message of the error that is set.
void name_argument(const char* op, const std::string& argument) {
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  PyObject* text = value == nullptr ? nullptr : PyObject_Str(value);
  const char* message = text == nullptr ? nullptr : PyUnicode_AsUTF8(text);
  PyErr_Format(type, "%s: %s: %s", op, argument.c_str(), message == nullptr ? "not valid" : message);
  Py_XDECREF(text);
  Py_XDECREF(type);
  Py_XDECREF(value);
  Py_XDECREF(traceback);
}

// `Op` has a name, a Params type, the last argument's name and type, and a launch().
template <class Op>
PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  static const Py_ssize_t expected = static_cast<Py_ssize_t>(names_of<typename Op::Params>().size()) + 1;
  if (count != expected)
    return PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", Op::name, expected, count);
  typename Op::Params params;
  typename Op::Last last;
  Reader reader{args};
  fields(reader, params);
  if (reader.ok) reader.next(last);
  if (!reader.ok) {
    auto names = names_of<typename Op::Params>();
    names.push_back(Op::last_name);
    name_argument(Op::name, names[reader.at]);
    return nullptr;
  }
  Status status;
  std::string thrown;
  PyThreadState* released = PyEval_SaveThread();
  try {
    status = Op::launch(params, last);
  } catch (const std::exception& error) {
    thrown = error.what();
    status = thrown.c_str();
  }
  PyEval_RestoreThread(released);
  if (status != nullptr) return PyErr_Format(PyExc_RuntimeError, "%s: %s", Op::name, status);
  Py_RETURN_NONE;
}

template <class Op>
void define(py::module_& module) {
  static std::string doc = [] {
    std::string text = std::string(Op::name) + "(";
    for (const std::string& name : names_of<typename Op::Params>()) text += name + ", ";
    return text + Op::last_name + ")";
  }();
  static PyMethodDef method{Op::name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call<Op>)),
                            METH_FASTCALL, doc.c_str()};
  const py::object name = module.attr("__name__");
  PyObject* function = PyCFunction_NewEx(&method, module.ptr(), name.ptr());
  if (function == nullptr) throw py::error_already_set();
  module.attr(Op::name) = py::reinterpret_steal<py::object>(function);
}

template <class P, class L>
P params_of(Status (*)(const P&, L));

#define DEFINE_OP(backend, op)                                                                  \
  struct backend##_##op {                                                                       \
    using Params = decltype(params_of(backend::op));                                            \
    using Last = backend##_last;                                                                \
    static constexpr const char* name = #op;                                                    \
    static constexpr const char* last_name = backend##_last_name;                               \
    static Status launch(const Params& params, Last last) { return backend::op(params, last); } \
  };
#define REGISTER_OP(backend, op) define<backend##_##op>(backend##_module);

using cpu_last = int32_t;
constexpr const char* cpu_last_name = "threads";
LINGBOT_OPS(DEFINE_OP, cpu)
LINGBOT_CPU_OPS_ALONE(DEFINE_OP)

#if defined(LINGBOT_WITH_CUDA)
using cuda_last = void*;
constexpr const char* cuda_last_name = "stream";
LINGBOT_OPS(DEFINE_OP, cuda)
#endif

py::tuple cpu_isas() {
  py::list names;
  for (const char* const* name = cpu::available_isas(); *name != nullptr; ++name) names.append(*name);
  return py::tuple(names);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() =
      "Compiled core of lingbot_kernels: launchers that take raw pointers; the Python layer checks what it passes.";
  module.attr("version") = LINGBOT_KERNELS_VERSION;
  module.attr("cpu_isa") = cpu::active_isa();
  define_call_table(module);

  py::module_ cpu_module =
      module.def_submodule("cpu", "Ops on the CPU; the last argument, threads, is 0 for every core.");
  LINGBOT_OPS(REGISTER_OP, cpu)
  LINGBOT_CPU_OPS_ALONE(REGISTER_OP)
  cpu_module.attr("isas") = cpu_isas();
  cpu_module.def(
      "set_isa",
      [module](const std::string& name) {
        if (!cpu::set_isa(name.c_str()))
          throw py::value_error("instruction set '" + name + "' is not one of " +
                                py::str(cpu_isas()).cast<std::string>());
        py::module_(module).attr("cpu_isa") = name;
      },
      py::arg("name"), "Selects one of `isas`; they give the same bits, the first is the fastest.");

#if defined(LINGBOT_WITH_CUDA)
  module.attr("compiled_with_cuda") = true;
  module.attr("cuda_architectures") = LINGBOT_CUDA_ARCHITECTURES;
  py::module_ cuda_module =
      module.def_submodule("cuda", "Ops on an NVIDIA GPU; the last argument is a stream's handle.");
  LINGBOT_OPS(REGISTER_OP, cuda)
#else
  module.attr("compiled_with_cuda") = false;
  module.attr("cuda_architectures") = "";
#endif
}

}  // namespace lingbot
