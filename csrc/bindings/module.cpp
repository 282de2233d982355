// torch_moelora._C: the instruction-set report, and the core on numpy arrays for tests. No torch.
#include "bindings/arrays.h"
#include "bindings/packed.h"
#include "bindings/rates.h"
#include "dispatch/table.h"
#include "formats/formats.h"

namespace moelora {
namespace {

py::dict isa_report() {
  py::list built, detected, permitted, usable;
  py::dict reasons, chosen;
  for (const IsaState& s : isa_states()) {
    if (s.built) built.append(name_of(s.isa));
    if (s.detected) detected.append(name_of(s.isa));
    if (s.detected && s.permitted) permitted.append(name_of(s.isa));
    if (s.usable())
      usable.append(name_of(s.isa));
    else
      reasons[name_of(s.isa)] = s.reason;
  }
  for (DType t : {DType::bf16, DType::f16, DType::f32, DType::f64}) chosen[name_of(t)] = name_of(kernels_for(t).isa);
  py::dict report;
  report["built"] = built;
  report["detected"] = detected;
  report["permitted"] = permitted;
  report["usable"] = usable;
  report["chosen"] = chosen;
  report["override"] = isa_override().empty() ? py::object(py::none()) : py::str(isa_override());
  report["reasons"] = reasons;
  return report;
}

// Instruction set -> format -> dtypes that it unpacks the format to with kernels of its own.
py::dict format_report() {
  py::dict report;
  for (const KernelChoice& choice : usable_kernels()) {
    py::str isa(name_of(choice.isa));
    if (!report.contains(isa)) report[isa] = py::dict();
    for (const FormatRow& row : kFormats) {
      if (row.format == Format::dense) continue;
      py::dict sets = report[isa];
      if (!sets.contains(row.name)) sets[row.name] = py::list();
      for (DType t : {DType::bf16, DType::f16, DType::f32, DType::f64})
        if (choice.kernels->unpack[static_cast<int>(row.code)][static_cast<int>(t)])
          py::list(sets[row.name]).append(name_of(t));
    }
  }
  return report;
}

}  // namespace
}  // namespace moelora

PYBIND11_MODULE(_C, m) {
  try {
    moelora::chosen_isa();
  } catch (const std::exception& e) {
    throw pybind11::import_error(e.what());
  }
  m.def("isa_report", &moelora::isa_report, "Instruction sets built, detected, permitted, usable and chosen.");
  m.def("format_report", &moelora::format_report,
        "Instruction set -> weight format -> dtypes it is unpacked to; of the usable sets.");
  m.attr("sanitizers") = MOELORA_SANITIZERS;
  m.attr("wide_emulated") = static_cast<bool>(MOELORA_WIDE_EMULATED);
  moelora::bind_arena(m);
  moelora::bind_contract(m);
  moelora::bind_kernels(m);
  moelora::bind_packed(m);
  moelora::bind_drivers(m);
  moelora::bind_unpack(m);
  moelora::bind_rates(m);
}
