// Calls of an op that were found valid, by the signature of their arguments: what lets a call skip checks it has
// passed.
#pragma once

#include <pybind11/pybind11.h>

namespace lingbot {

// Adds the class CallTable, and `environment` that reads a variable in a tenth of a microsecond, to the module.
void define_call_table(pybind11::module_& module);

}  // namespace lingbot
