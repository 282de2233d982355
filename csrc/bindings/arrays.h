// Micro-kernels and drivers on numpy arrays.
#pragma once

#include <pybind11/pybind11.h>

namespace moelora {

void bind_arrays(pybind11::module_& m);

}  // namespace moelora
