// The module `icsd._native`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding/functions.h"
#include "cpu/kernels/kernels.h"
#include "cpu/runtime/memory.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  using namespace icsd;
  m.doc() = "The fused kernels, as functions of tensors. Use icsd.ops, which checks arguments and differentiates.";
  // It is raised, with the one of icsd/ops/cpu.py, when what a function takes or returns changes.
  m.attr("INTERFACE") = 7;
  m.attr("build") = py::dict(py::arg("compiler") = ICSD_COMPILER, py::arg("cpu") = ICSD_CPU_ISAS,
                             py::arg("cuda") = ICSD_CUDA_ARCHITECTURES);
  py::dict losses;
  for (const LossKind kind : kAllLosses) losses[name_of(kind)] = parameters_of(kind);
  m.attr("LOSSES") = losses;
  py::class_<Spec>(m, "Spec", py::module_local())
      .def(py::init(&spec_of), py::arg("loss"), py::arg("parameters"), py::arg("weights"), py::arg("eps"),
           py::arg("teacher_gradient"), py::arg("regime"), py::arg("center") = false);
  m.def("cpu_isa", [] { return cpu::kernels().isa; });
  m.def("empty_cache", &cpu::empty_cache);
  define_cpu(m.def_submodule("cpu"));
#ifdef ICSD_CUDA
  define_cuda(m.def_submodule("cuda"));
#endif
}
