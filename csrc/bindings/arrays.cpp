#include "bindings/arrays.h"

namespace moelora {

void bind_arrays(pybind11::module_&) {}

}  // namespace moelora
