// The functions of a backend, `gram`, `combine`, `distill` and `distill_backward`, as Python calls them, and `reads`,
// which tells whether they can read tensors.
//
// A backend is made anew for each call, from its tensors, which it checks. Then it makes new tensors and runs the
// kernels.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "binding/arguments.h"
#include "binding/tensor.h"

namespace icsd {

// Checks that a tensor is on a device.
inline void check_device(const Tensor& x, dlpack::DLDevice device, const char* name) {
  if (x.device.device_type == device.device_type && x.device.device_id == device.device_id) return;
  const bool on_cpu = device.device_type == dlpack::kDLCPU;
  refuse(std::string(name) + " must be on " + (on_cpu ? "the CPU" : "CUDA device " + std::to_string(device.device_id)));
}

inline void check_devices(const std::vector<Tensor>& tensors, dlpack::DLDevice device, const char* name) {
  for (const Tensor& tensor : tensors) check_device(tensor, device, name);
}

template <class Backend>
pybind11::object gram(const Tensor& x) {
  const dlpack::DLDevice device = Backend::device_of(x);
  check_device(x, device, "x");
  const Batch batch = batch_of(x, "x");
  Backend backend(x, {{batch.features}, batch.shape});
  const auto [groups, n] = batch.shape;
  return with_compute_type(batch.features.dtype == DType::float64, [&](auto c) {
    using C = decltype(c);
    const NewTensor out = backend.new_tensor(kDType<C>, sizes_like(x, {n, n}));
    backend.gram(batch.features, batch.shape, static_cast<C*>(out.data));
    return out.object;
  });
}

template <class Backend>
pybind11::object combine(const Tensor& matrix, const Tensor& x) {
  const dlpack::DLDevice device = Backend::device_of(x);
  check_device(x, device, "x");
  check_device(matrix, device, "matrix");
  const Batch batch = batch_of(x, "x");
  const int64_t outputs = outputs_of(matrix, batch), dim = batch.features.dim;
  const DType dtype = batch.features.dtype;
  Backend backend(x, {{batch.features}, batch.shape});
  return with_compute_type(dtype == DType::float64, [&](auto c) {
    using C = decltype(c);
    const C* elements = elements_of<C>(matrix, product(batch.shape.groups, outputs, batch.shape.samples), "matrix");
    const NewTensor result = backend.new_tensor(dtype, sizes_like(x, {outputs, dim}));
    const Features out{result.data, dtype, dim, product(outputs, dim, 1), dim};
    backend.combine(elements, outputs, batch.features, out, batch.shape);
    return result.object;
  });
}

template <class Backend>
pybind11::tuple distill(const std::vector<Tensor>& tensors, const Spec& spec, bool save) {
  const Inputs inputs = inputs_of(tensors);
  check_devices(tensors, Backend::device_of(tensors[0]), "input");
  check_count(inputs, spec, true);
  Backend backend(tensors[0], inputs);
  backend.check_regime(inputs, spec.regime);
  const auto sizes = saved_sizes<Backend>(tensors[0], inputs, spec.regime, static_cast<int64_t>(tensors.size()));
  return with_compute_type(inputs.is_double(), [&](auto c) {
    using C = decltype(c);
    const DType saved_dtype = spec.regime == Regime::feature ? DType::float64 : kDType<C>;
    const NewTensor loss = backend.new_tensor(kDType<C>, sizes_like(tensors[0], {}));
    const NewTensor saved = backend.new_tensor(saved_dtype, save ? sizes : std::vector<int64_t>{0});
    backend.distill(inputs, spec, static_cast<C*>(loss.data), save ? saved.data : nullptr);
    return pybind11::make_tuple(loss.object, saved.object);
  });
}

// Makes the gradients that are wanted: as memory for the kernels and, in `list`, as Python's tensors or None.
template <class Backend>
std::vector<Features> new_gradients(Backend& backend, const std::vector<Tensor>& tensors, const Inputs& inputs,
                                    const std::vector<bool>& wanted, pybind11::list list) {
  std::vector<Features> gradients;
  for (std::size_t k = 0; k < tensors.size(); ++k) {
    if (!wanted[k]) {
      gradients.push_back({});
      list.append(pybind11::none());
      continue;
    }
    const DType dtype = inputs.features[k].dtype;
    const int64_t n = inputs.shape.samples, dim = inputs.features[k].dim;
    const NewTensor gradient = backend.new_tensor(dtype, sizes_like(tensors[k], {n, dim}));
    gradients.push_back({gradient.data, dtype, dim, product(n, dim, 1), dim});
    list.append(gradient.object);
  }
  return gradients;
}

template <class Backend>
pybind11::list distill_backward(const Tensor& grad, const Tensor& saved, const std::vector<Tensor>& tensors,
                                const std::vector<bool>& wanted, const Spec& spec) {
  const Inputs inputs = inputs_of(tensors);
  const dlpack::DLDevice device = Backend::device_of(tensors[0]);
  check_devices(tensors, device, "input");
  check_device(grad, device, "grad");
  check_device(saved, device, "saved");
  check_count(inputs, spec, spec.teacher_gradient || spec.regime != Regime::sample);
  if (wanted.size() != tensors.size()) refuse("wanted must have one element for each input");
  Backend backend(tensors[0], inputs);
  backend.check_regime(inputs, spec.regime);
  int64_t saved_elements = 1;
  const auto stages = static_cast<int64_t>(spec.weights.size()) + 1;
  for (const int64_t size : saved_sizes<Backend>(tensors[0], inputs, spec.regime, stages)) saved_elements *= size;
  const bool is_double = dtype_of(grad, "grad") == DType::float64;
  if (inputs.is_double() && !is_double) refuse("grad is not of the compute type");
  pybind11::list list;
  with_compute_type(is_double, [&](auto c) {
    using C = decltype(c);
    const C* grads = elements_of<C>(grad, inputs.shape.groups, "grad");
    const void* elements = spec.regime == Regime::feature
                               ? static_cast<const void*>(elements_of<double>(saved, saved_elements, "saved"))
                               : elements_of<C>(saved, saved_elements, "saved");
    const std::vector<Features> gradients = new_gradients(backend, tensors, inputs, wanted, list);
    backend.distill_backward(grads, elements, inputs, gradients, spec);
  });
  return list;
}

template <class Backend>
void define_functions(pybind11::module_& module) {
  using pybind11::arg;
  module.def("reads", &reads, arg("tensors"));
  module.def("gram", &gram<Backend>, arg("x"));
  module.def("combine", &combine<Backend>, arg("matrix"), arg("x"));
  module.def("distill", &distill<Backend>, arg("inputs"), arg("spec"), arg("save"));
  module.def("distill_backward", &distill_backward<Backend>, arg("grad"), arg("saved"), arg("inputs"), arg("wanted"),
             arg("spec"));
}

void define_cpu(pybind11::module_ module);
void define_cuda(pybind11::module_ module);

}  // namespace icsd
