// A signature is all that an op's checks and the constants of its launch depend on: of a tensor the shape, strides,
// dtype, device and the address modulo 16, of numbers and strings the value, of a list of tensors that of each. What
// differs from call to call under one signature is looked at in each: addresses (a written tensor must lie apart from
// the others) and the numbers declared as varying (0 or more). Tensors are read through the function table that
// DLPack 1.3 puts on their type; where there is none, or another version, no call is ever found.
#include "call_table.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace lingbot {
namespace {

// The part of DLPack's binary interface that is used here (dlpack.h, version 1.3).
struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct DlExchange {
  uint32_t major, minor;
  void* previous;
  void *allocate, *to_managed, *from_managed;
  int (*borrow)(void* object, DlTensor* out);  // no reference is taken; 0, or -1 with a Python error
};

constexpr uint32_t kDlMajor = 1;
constexpr char kDlCapsule[] = "dlpack_exchange_api";
constexpr size_t kMaxArguments = 32;
constexpr size_t kMaxTensors = 256;  // those in lists included
constexpr size_t kMaxSignature = 8192;
constexpr uintptr_t kAlignment = 16;  // launchers choose by whether an address is a multiple of it

struct Span {
  uintptr_t start, stop;  // first byte, and the byte after the last; equal where there is none
  bool written;
  bool overlaps(const Span& other) const { return start < other.stop && other.start < stop; }
};

// One call's arguments as they were read.
struct Reading {
  size_t size = 0;  // of the signature
  char bytes[kMaxSignature];
  size_t tensors = 0;
  Span spans[kMaxTensors];
  const Span* span_of[kMaxArguments];  // null for what is not a tensor itself

  bool put(const void* data, size_t count) {
    if (count > kMaxSignature - size) return false;
    std::memcpy(bytes + size, data, count);
    size += count;
    return true;
  }
  template <class T> bool put(const T& value) { return put(&value, sizeof(value)); }
};

struct Slot {  // an argument of the launcher that is filled in at each call
  Py_ssize_t position;
  size_t source;  // of the op's arguments
};

struct Kept {
  std::string signature;
  py::object plan;
  py::tuple arguments;  // of the launcher
  std::vector<Slot> slots;
  bool addresses;  // tensors are handed over as ints
};

class CallTable {
 public:
  CallTable(const py::object& exchange, const py::tuple& tensors, const py::tuple& constants,
            const std::vector<size_t>& written, const std::vector<size_t>& varying, size_t limit)
      : tensors_(tensors),
        constants_(constants),
        written_(mask("written", written)),
        varying_(mask("varying", varying)),
        limit_(limit) {
    if (limit_ < 1) throw py::value_error("limit: must be at least 1");
    if (!PyCapsule_IsValid(exchange.ptr(), kDlCapsule)) return;
    const auto* table = static_cast<const DlExchange*>(PyCapsule_GetPointer(exchange.ptr(), kDlCapsule));
    if (table->major == kDlMajor) borrow_ = table->borrow;
  }

  bool keep(const py::tuple& call, py::object plan, py::tuple arguments,
            const std::vector<std::pair<Py_ssize_t, size_t>>& slots, bool addresses) {
    Reading reading;
    if (!read(call.ptr(), false, reading)) return false;
    auto kept = std::make_shared<Kept>();
    for (const auto& [position, source] : slots) {
      if (position < 0 || position >= static_cast<Py_ssize_t>(arguments.size()) || source >= call.size())
        throw py::value_error("slots: got one outside the arguments");
      kept->slots.push_back({position, source});
    }
    kept->signature.assign(reading.bytes, reading.size);
    kept->plan = std::move(plan);
    kept->arguments = std::move(arguments);
    kept->addresses = addresses;
    if (calls_.size() >= limit_) clear();  // shapes changed that often: those in use come back at their next call
    std::shared_ptr<const Kept> added = std::move(kept);
    calls_[added->signature].swap(added);  // what it replaces goes at the end, when the table is whole again
    last_ = nullptr;
    return true;
  }

  // (plan, the launcher's arguments) as a new reference, or None where this call has to be checked; null on an error.
  PyObject* find(PyObject* call, bool grad) {
    Reading reading;
    if (!read(call, grad, reading) || shares_memory(reading)) Py_RETURN_NONE;
    // Held here: allocating may collect garbage, whose finalizers (and threads that they let run) may clear the table.
    std::shared_ptr<const Kept> kept = last_;
    if (kept == nullptr || kept->signature.size() != reading.size ||
        std::memcmp(kept->signature.data(), reading.bytes, reading.size) != 0) {
      const auto found = calls_.find(std::string(reading.bytes, reading.size));
      if (found == calls_.end()) Py_RETURN_NONE;
      kept = last_ = found->second;
    }
    return filled(*kept, call, reading);
  }

  void clear() {
    decltype(calls_) dropped;
    dropped.swap(calls_);
    last_ = nullptr;
  }
  size_t size() const { return calls_.size(); }

 private:
  static uint32_t mask(const char* name, const std::vector<size_t>& indices) {
    uint32_t bits = 0;
    for (const size_t i : indices) {
      if (i >= kMaxArguments) throw py::value_error(std::string(name) + ": an index is too large");
      bits |= uint32_t{1} << i;
    }
    return bits;
  }

  static bool is_one_of(const py::tuple& types, PyObject* argument) {
    const Py_ssize_t count = PyTuple_GET_SIZE(types.ptr());
    for (Py_ssize_t i = 0; i < count; ++i)
      if (reinterpret_cast<PyObject*>(Py_TYPE(argument)) == PyTuple_GET_ITEM(types.ptr(), i)) return true;
    return false;
  }

  // False where an argument is of a kind that has no signature; no Python error is left set.
  bool read(PyObject* call, bool grad, Reading& reading) const {
    const Py_ssize_t count = PyTuple_GET_SIZE(call);
    if (borrow_ == nullptr || count > static_cast<Py_ssize_t>(kMaxArguments)) return false;
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* argument = PyTuple_GET_ITEM(call, i);
      const bool written = (written_ >> i & 1) != 0;
      bool fits;
      reading.span_of[i] = nullptr;
      if (is_one_of(tensors_, argument)) {
        reading.span_of[i] = &reading.spans[reading.tensors];
        fits = read_tensor(argument, grad, written, reading);
      } else if (PyList_CheckExact(argument)) {
        fits = read_list(argument, grad, written, reading);
      } else {
        fits = read_value(argument, (varying_ >> i & 1) != 0, reading);
      }
      if (!fits) {
        PyErr_Clear();
        return false;
      }
    }
    return true;
  }

  bool read_list(PyObject* list, bool grad, bool written, Reading& reading) const {
    const Py_ssize_t count = PyList_GET_SIZE(list);
    if (!reading.put('L') || !reading.put(count)) return false;
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* item = PyList_GET_ITEM(list, i);
      if (!is_one_of(tensors_, item) || !read_tensor(item, grad, written, reading)) return false;
    }
    return true;
  }

  bool read_tensor(PyObject* argument, bool grad, bool written, Reading& reading) const {
    if (reading.tensors == kMaxTensors) return false;
    if (grad) {
      static PyObject* const name = PyUnicode_InternFromString("requires_grad");
      PyObject* required = PyObject_GetAttr(argument, name);
      Py_XDECREF(required);
      if (required != Py_False) return false;  // autograd has to see it
    }
    DlTensor tensor;
    if (borrow_(argument, &tensor) != 0 || tensor.ndim < 0 || (tensor.ndim > 0 && tensor.strides == nullptr))
      return false;
    const uintptr_t start = reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset;
    int64_t last = 0;
    bool empty = false;
    for (int32_t d = 0; d < tensor.ndim; ++d) {
      empty |= tensor.shape[d] == 0;
      last += (tensor.shape[d] - 1) * tensor.strides[d];
    }
    const uint64_t nbytes =
        empty ? 0 : (static_cast<uint64_t>(last) + 1) * ((tensor.dtype_bits * tensor.dtype_lanes + 7) / 8);
    reading.spans[reading.tensors++] = {start, start + nbytes, written};
    const size_t dims = sizeof(int64_t) * tensor.ndim;
    return reading.put('T') && reading.put(static_cast<char>(start % kAlignment)) && reading.put(tensor.device_type) &&
           reading.put(tensor.device_id) && reading.put(tensor.dtype_code) && reading.put(tensor.dtype_bits) &&
           reading.put(tensor.dtype_lanes) && reading.put(tensor.ndim) && reading.put(tensor.shape, dims) &&
           reading.put(tensor.strides, dims);
  }

  bool read_value(PyObject* argument, bool varying, Reading& reading) const {
    if (argument == Py_None) return reading.put('N');
    if (PyBool_Check(argument)) return reading.put(argument == Py_True ? 't' : 'f');
    if (PyLong_CheckExact(argument)) {
      const long long value = PyLong_AsLongLong(argument);
      if (value == -1 && PyErr_Occurred() != nullptr) return false;
      return varying ? value >= 0 && reading.put('V') : reading.put('I') && reading.put(value);
    }
    if (PyFloat_CheckExact(argument)) return reading.put('F') && reading.put(PyFloat_AS_DOUBLE(argument));
    if (PyUnicode_CheckExact(argument)) {
      Py_ssize_t length;
      const char* text = PyUnicode_AsUTF8AndSize(argument, &length);
      return text != nullptr && reading.put('S') && reading.put(length) && reading.put(text, length);
    }
    return is_one_of(constants_, argument) && reading.put('C') && reading.put(argument);
  }

  static bool shares_memory(const Reading& reading) {
    for (size_t i = 0; i < reading.tensors; ++i)
      for (size_t j = 0; reading.spans[i].written && j < reading.tensors; ++j)
        if (j != i && reading.spans[i].overlaps(reading.spans[j])) return true;
    return false;
  }

  static PyObject* filled(const Kept& kept, PyObject* call, const Reading& reading) {
    const Py_ssize_t count = PyTuple_GET_SIZE(kept.arguments.ptr());
    PyObject* arguments = PyList_New(count);
    if (arguments == nullptr) return nullptr;
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* constant = PyTuple_GET_ITEM(kept.arguments.ptr(), i);
      Py_INCREF(constant);
      PyList_SET_ITEM(arguments, i, constant);
    }
    for (const Slot& slot : kept.slots) {
      PyObject* value = PyTuple_GET_ITEM(call, slot.source);
      if (kept.addresses && reading.span_of[slot.source] != nullptr) {
        value = PyLong_FromUnsignedLongLong(reading.span_of[slot.source]->start);
      } else {
        Py_INCREF(value);
      }
      if (value == nullptr || PyList_SetItem(arguments, slot.position, value) != 0) {
        Py_DECREF(arguments);
        return nullptr;
      }
    }
    PyObject* both = PyTuple_Pack(2, kept.plan.ptr(), arguments);
    Py_DECREF(arguments);
    return both;
  }

  py::tuple tensors_;    // exact types that are read as tensors
  py::tuple constants_;  // exact types whose objects live as long as the process: they are known by their address
  uint32_t written_, varying_;  // of the arguments, one bit each
  size_t limit_;
  int (*borrow_)(void*, DlTensor*) = nullptr;
  std::unordered_map<std::string, std::shared_ptr<const Kept>> calls_;
  std::shared_ptr<const Kept> last_;  // a model's layers call with one signature after another
};

constexpr char kTableCapsule[] = "lingbot_kernels.CallTable";

PyObject* find(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (count != 2 || !PyTuple_CheckExact(args[0]))
    return PyErr_Format(PyExc_TypeError, "find takes a tuple and whether autograd records");
  auto* table = static_cast<std::shared_ptr<CallTable>*>(PyCapsule_GetPointer(self, kTableCapsule));
  return table == nullptr ? nullptr : (*table)->find(args[0], args[1] == Py_True);
}

// `find` bound to its table, called without an argument converter.
py::object bound_find(const std::shared_ptr<CallTable>& table) {
  static PyMethodDef method{"find", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(find)), METH_FASTCALL,
                            "(call, grad) -> (plan, arguments) of a call that was kept, or None."};
  const py::capsule self(new std::shared_ptr<CallTable>(table), kTableCapsule, [](PyObject* capsule) {
    delete static_cast<std::shared_ptr<CallTable>*>(PyCapsule_GetPointer(capsule, kTableCapsule));
  });
  PyObject* function = PyCFunction_NewEx(&method, self.ptr(), nullptr);
  if (function == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(function);
}

PyObject* environment(PyObject*, PyObject* name) {
  const char* key = PyUnicode_AsUTF8(name);
  if (key == nullptr) return nullptr;
  const char* value = std::getenv(key);
  if (value == nullptr) Py_RETURN_NONE;
  return PyUnicode_DecodeFSDefault(value);
}

}  // namespace

void define_call_table(py::module_& module) {
  static PyMethodDef method{"environment", environment, METH_O, "A variable of the process's environment, or None."};
  PyObject* function = PyCFunction_NewEx(&method, nullptr, nullptr);
  if (function == nullptr) throw py::error_already_set();
  module.attr("environment") = py::reinterpret_steal<py::object>(function);
  py::class_<CallTable, std::shared_ptr<CallTable>>(
      module, "CallTable", "Calls of an op that were found valid, by their arguments' signature.")
      .def(py::init<const py::object&, const py::tuple&, const py::tuple&, const std::vector<size_t>&,
                    const std::vector<size_t>&, size_t>(),
           py::arg("exchange"), py::arg("tensors"), py::arg("constants"), py::arg("written"), py::arg("varying"),
           py::arg("limit"))
      .def_property_readonly("find", [](const std::shared_ptr<CallTable>& table) { return bound_find(table); })
      .def("keep", &CallTable::keep, py::arg("call"), py::arg("plan"), py::arg("arguments"), py::arg("slots"),
           py::arg("addresses"))
      .def("clear", &CallTable::clear)
      .def("__len__", &CallTable::size);
}

}  // namespace lingbot
