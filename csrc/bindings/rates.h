// The machine's own ceilings, as the kernels can reach them.
#pragma once

#include <pybind11/pybind11.h>

namespace moelora {

void bind_rates(pybind11::module_& m);

}  // namespace moelora
