// The native module: checks what Python hands over, then calls the operator without the interpreter's lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/operator.h"

namespace py = pybind11;

namespace {

using icsd::DType;
using icsd::cpu::Features;
using icsd::cpu::Shape;
using std::int64_t;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("icsd._native: " + what); }

// a * b * c for sizes, which are not negative.
int64_t product(int64_t a, int64_t b, int64_t c) {
  int64_t ab = 0, abc = 0;
  if (__builtin_mul_overflow(a, b, &ab) || __builtin_mul_overflow(ab, c, &abc)) refuse("sizes overflow 64 bits");
  return abc;
}

DType dtype_of(int code) {
  if (code < 0 || code >= icsd::kDTypes) refuse("unknown dtype code " + std::to_string(code));
  return static_cast<DType>(code);
}

Shape shape_of(int64_t groups, int64_t samples) {
  if (groups < 0 || samples < 0) {
    refuse("groups and samples must not be negative, got " + std::to_string(groups) + " and " + std::to_string(samples));
  }
  product(groups, samples, samples + 1);
  return {groups, samples};
}

template <class C>
C* matrix_at(std::uintptr_t address, int64_t elements, const char* name) {
  if (!address && elements > 0) refuse(std::string(name) + " is a null pointer");
  if (address % sizeof(C)) refuse(std::string(name) + " is not aligned to its element");
  return reinterpret_cast<C*>(address);
}

// (address, dtype, features, group stride, sample stride)
using FeaturesTuple = std::tuple<std::uintptr_t, int, int64_t, int64_t, int64_t>;

Features features_of(const FeaturesTuple& tuple, Shape shape, const char* name) {
  const auto& [address, code, features, group_stride, sample_stride] = tuple;
  const DType dtype = dtype_of(code);
  if (features < 0 || group_stride < 0 || sample_stride < 0) {
    refuse(std::string(name) + ": sizes and strides must not be negative");
  }
  const int64_t last_group = product(std::max<int64_t>(shape.groups - 1, 0), group_stride, 1);
  const int64_t last_sample = product(std::max<int64_t>(shape.samples - 1, 0), sample_stride, 1);
  int64_t extent = 0;
  if (__builtin_add_overflow(last_group, last_sample, &extent) ||
      __builtin_add_overflow(extent, features, &extent)) {
    refuse("sizes overflow 64 bits");
  }
  product(extent, static_cast<int64_t>(icsd::size_of(dtype)), 1);
  const bool empty = product(shape.groups, shape.samples, features) == 0;
  if (!address && !empty) refuse(std::string(name) + " is a null pointer");
  if (address % icsd::size_of(dtype)) refuse(std::string(name) + " is not aligned to its element");
  return {reinterpret_cast<void*>(address), dtype, features, group_stride, sample_stride};
}

// A result's samples must not overlap each other, nor the samples it is computed from.
void check_result(const Features& out, int64_t outputs, const Features& x, Shape shape, const char* name) {
  if (out.dtype != x.dtype || out.features != x.features) refuse(std::string(name) + " does not match its input");
  const bool dense = (outputs <= 1 || out.sample_stride >= out.features) &&
                     (shape.groups <= 1 || out.group_stride >= product(outputs, out.sample_stride, 1));
  if (!dense) refuse(std::string(name) + " overlaps itself");
  const auto bytes = [&](const Features& f, int64_t samples) {
    const auto begin = reinterpret_cast<std::uintptr_t>(f.data);
    if (!shape.groups || !samples || !f.features) return std::pair{begin, begin};
    const int64_t elements = (shape.groups - 1) * f.group_stride + (samples - 1) * f.sample_stride + f.features;
    return std::pair{begin, begin + elements * icsd::size_of(f.dtype)};
  };
  const auto [out_begin, out_end] = bytes(out, outputs);
  const auto [x_begin, x_end] = bytes(x, shape.samples);
  if (out_begin < x_end && x_begin < out_end) refuse(std::string(name) + " overlaps its input");
}

template <class Call>
void with_compute_type(bool wide, const Call& call) {
  if (wide) {
    call(double{});
  } else {
    call(float{});
  }
}

bool any_wide(const std::vector<Features>& stages) {
  for (const Features& stage : stages) {
    if (stage.dtype == DType::float64) return true;
  }
  return false;
}

void gram(const FeaturesTuple& x_tuple, int64_t groups, int64_t samples, std::uintptr_t out) {
  const Shape shape = shape_of(groups, samples);
  const Features x = features_of(x_tuple, shape, "x");
  with_compute_type(any_wide({x}), [&](auto c) {
    using C = decltype(c);
    C* matrix = matrix_at<C>(out, product(groups, samples, samples), "out");
    py::gil_scoped_release unlocked;
    icsd::cpu::gram<C>(x, shape, matrix);
  });
}

void combine(std::uintptr_t matrix_address, int64_t outputs, const FeaturesTuple& x_tuple, int64_t groups,
             int64_t samples, const FeaturesTuple& out_tuple) {
  const Shape shape = shape_of(groups, samples), out_shape = shape_of(groups, outputs);
  const Features x = features_of(x_tuple, shape, "x"), out = features_of(out_tuple, out_shape, "out");
  check_result(out, outputs, x, shape, "out");
  with_compute_type(any_wide({x}), [&](auto c) {
    using C = decltype(c);
    const C* matrix = matrix_at<C>(matrix_address, product(groups, outputs, samples), "matrix");
    py::gil_scoped_release unlocked;
    icsd::cpu::combine<C>(matrix, outputs, x, out, shape);
  });
}

std::vector<Features> stages_of(const std::vector<FeaturesTuple>& tuples, Shape shape) {
  std::vector<Features> stages;
  for (const FeaturesTuple& tuple : tuples) stages.push_back(features_of(tuple, shape, "stage"));
  return stages;
}

icsd::DivergenceKind divergence_of(int code, const std::vector<double>& parameters) {
  if (code < 0 || code >= icsd::kDivergences) refuse("unknown divergence code " + std::to_string(code));
  const auto kind = static_cast<icsd::DivergenceKind>(code);
  const std::size_t count =
      icsd::with_divergence(kind, [](auto tag) { return decltype(tag)::template Of<double>::kParameters; });
  if (parameters.size() != count) {
    refuse("divergence " + std::to_string(code) + " takes " + std::to_string(count) + " parameters, got " +
           std::to_string(parameters.size()));
  }
  return kind;
}

void distill(const std::vector<FeaturesTuple>& tuples, int64_t groups, int64_t samples,
             const std::vector<double>& weights, int divergence, const std::vector<double>& parameters, double eps,
             bool teacher_gradient, std::uintptr_t loss_address, std::uintptr_t slots_address) {
  const Shape shape = shape_of(groups, samples);
  const std::vector<Features> stages = stages_of(tuples, shape);
  if (stages.empty()) refuse("there is no teacher");
  if (weights.size() + 1 != stages.size()) refuse("one weight for each student is needed");
  const icsd::cpu::Distillation how{divergence_of(divergence, parameters), parameters.data(), weights.data(), eps,
                                    teacher_gradient};
  with_compute_type(any_wide(stages), [&](auto c) {
    using C = decltype(c);
    C* loss = matrix_at<C>(loss_address, groups, "loss");
    const int64_t elements = product(static_cast<int64_t>(stages.size()), groups, samples * (samples + 1));
    C* slots = slots_address ? matrix_at<C>(slots_address, elements, "slots") : nullptr;
    py::gil_scoped_release unlocked;
    icsd::cpu::distill<C>(stages, shape, how, loss, slots);
  });
}

void distill_backward(std::uintptr_t grad_address, std::uintptr_t slots_address,
                      const std::vector<FeaturesTuple>& tuples, const std::vector<FeaturesTuple>& out_tuples, bool wide,
                      int64_t groups, int64_t samples) {
  const Shape shape = shape_of(groups, samples);
  const std::vector<Features> stages = stages_of(tuples, shape);
  if (out_tuples.size() != stages.size()) refuse("one result for each stage is needed");
  std::vector<Features> outs;
  for (std::size_t k = 0; k < stages.size(); ++k) {
    const bool wanted = std::get<0>(out_tuples[k]) != 0;
    outs.push_back(wanted ? features_of(out_tuples[k], shape, "out") : Features{});
    if (wanted) check_result(outs[k], samples, stages[k], shape, "out");
  }
  with_compute_type(wide, [&](auto c) {
    using C = decltype(c);
    const C* grad = matrix_at<C>(grad_address, groups, "grad");
    const int64_t elements = product(static_cast<int64_t>(stages.size()), groups, samples * (samples + 1));
    const C* slots = matrix_at<C>(slots_address, elements, "slots");
    py::gil_scoped_release unlocked;
    icsd::cpu::distill_backward<C>(grad, slots, stages, outs, shape);
  });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Fused kernels on raw pointers; use icsd.ops, which checks tensors and keeps them alive.";
  m.def("gram", &gram, py::arg("x"), py::arg("groups"), py::arg("samples"), py::arg("out"));
  m.def("combine", &combine, py::arg("matrix"), py::arg("outputs"), py::arg("x"), py::arg("groups"), py::arg("samples"),
        py::arg("out"));
  m.def("distill", &distill, py::arg("stages"), py::arg("groups"), py::arg("samples"), py::arg("weights"),
        py::arg("divergence"), py::arg("parameters"), py::arg("eps"), py::arg("teacher_gradient"), py::arg("loss"),
        py::arg("slots"));
  m.def("distill_backward", &distill_backward, py::arg("grad"), py::arg("slots"), py::arg("stages"), py::arg("outs"),
        py::arg("wide"), py::arg("groups"), py::arg("samples"));
  m.def("cpu_isa", [] { return icsd::cpu::kernels().isa; });
  m.attr("build") = py::dict(py::arg("compiler") = ICSD_COMPILER, py::arg("cpu") = ICSD_CPU_ISAS,
                             py::arg("cuda") = ICSD_CUDA_ARCHITECTURES);
}
