// Scratch memory for tests: pieces as addresses.
#include "core/arena.h"

#include <memory>
#include <vector>

#include "bindings/arrays.h"

namespace moelora {
namespace {

// An arena and its open scopes, innermost last.
struct ScopedArena {
  Arena arena;
  std::vector<std::unique_ptr<Arena::Scope>> scopes;
  ~ScopedArena() {
    while (!scopes.empty()) scopes.pop_back();
  }
};

}  // namespace

void bind_arena(py::module_& m) {
  py::class_<ScopedArena>(m, "Arena", py::module_local(), "Scratch of one thread.")
      .def(py::init<>())
      .def("enter", [](ScopedArena& a) { a.scopes.push_back(std::make_unique<Arena::Scope>(a.arena)); })
      .def("leave",
           [](ScopedArena& a) {
             require(!a.scopes.empty(), "no scope is open");
             a.scopes.pop_back();
           })
      .def("take",
           [](ScopedArena& a, int64_t bytes) {
             require(!a.scopes.empty() && bytes >= 0, "take needs an open scope and a size of at least 0");
             return reinterpret_cast<uintptr_t>(a.arena.take(bytes));
           })
      .def_property_readonly("held", [](const ScopedArena& a) { return a.arena.held(); });
}

}  // namespace moelora
