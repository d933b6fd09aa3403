// The native module: the operator on tensors, without the interpreter's lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "binding/arguments.h"
#include "binding/tensor.h"
#include "cpu/feature.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/operator.h"
#include "cpu/streamed.h"
#ifdef ICSD_CUDA
#include "cuda/operator.h"
#endif

namespace py = pybind11;

namespace icsd {
namespace {

// Rows of a matrix (*B, M, N) for `combine`.
int64_t outputs_of(const Tensor& matrix, const Batch& x) {
  if (matrix.dimensions < 2) refuse("matrix must have the shape (*B, M, N)");
  if (matrix.sizes[matrix.dimensions - 1] != x.shape.samples) refuse("matrix and x do not fit");
  return matrix.sizes[matrix.dimensions - 2];
}

py::object gram(const Tensor& x) {
  check_on_cpu(x, "x");
  const Batch batch = batch_of(x, "x");
  return with_compute_type(batch.features.dtype == DType::float64, [&](auto c) {
    using C = decltype(c);
    const NewTensor out = new_tensor(x, kDType<C>, sizes_like(x, {batch.shape.samples, batch.shape.samples}));
    {
      py::gil_scoped_release unlocked;
      cpu::gram<C>(batch.features, batch.shape, static_cast<C*>(out.data));
    }
    return out.object;
  });
}

py::object combine(const Tensor& matrix, const Tensor& x) {
  check_on_cpu(matrix, "matrix");
  check_on_cpu(x, "x");
  const Batch batch = batch_of(x, "x");
  const int64_t outputs = outputs_of(matrix, batch), width = batch.features.features;
  const DType dtype = batch.features.dtype;
  const NewTensor result = new_tensor(x, dtype, sizes_like(x, {outputs, width}));
  const Features out{result.data, dtype, width, product(outputs, width, 1), width};
  with_compute_type(dtype == DType::float64, [&](auto c) {
    using C = decltype(c);
    const C* elements = elements_of<C>(matrix, product(batch.shape.groups, outputs, batch.shape.samples), "matrix");
    py::gil_scoped_release unlocked;
    cpu::combine<C>(elements, outputs, batch.features, out, batch.shape);
  });
  return result.object;
}

py::tuple distill(const std::vector<Tensor>& tensors, bool save, const std::vector<double>& weights, int loss_kind,
                  const std::vector<double>& parameters, double eps, bool teacher_gradient, const std::string& name) {
  for (const Tensor& tensor : tensors) check_on_cpu(tensor, "stage");
  const Stages stages = stages_of(tensors);
  check_count(stages, weights, true);
  const Distillation how = distillation_of(weights, loss_kind, parameters, eps, teacher_gradient);
  const Regime regime = regime_of(name, how.loss);
  const int64_t n = stages.shape.samples;
  std::vector<int64_t> saved_sizes{0};
  if (save && regime == Regime::sample) {
    saved_sizes = sizes_like(tensors[0], {n, n + 1});
    saved_sizes.insert(saved_sizes.begin(), static_cast<int64_t>(tensors.size()));
  } else if (save) {
    saved_sizes = sizes_like(tensors[0], {saved_numbers(regime, stages)});
  }
  return with_compute_type(stages.wide(), [&](auto c) {
    using C = decltype(c);
    const NewTensor loss = new_tensor(tensors[0], kDType<C>, sizes_like(tensors[0], {}));
    const NewTensor saved = new_tensor(tensors[0], regime == Regime::feature ? DType::float64 : kDType<C>, saved_sizes);
    {
      py::gil_scoped_release unlocked;
      C *const losses = static_cast<C*>(loss.data), *const numbers = static_cast<C*>(saved.data);
      switch (regime) {
        case Regime::sample: cpu::distill<C>(stages.features, stages.shape, how, losses, numbers); break;
        case Regime::streamed: cpu::distill_streamed<C>(stages.features, stages.shape, how, losses, numbers); break;
        case Regime::feature:
          cpu::distill_feature<C>(stages.features, stages.shape, how, losses, static_cast<double*>(saved.data));
      }
    }
    return py::make_tuple(loss.object, saved.object);
  });
}

py::list distill_backward(const Tensor& grad, const Tensor& saved, const std::vector<Tensor>& tensors,
                          const std::vector<bool>& wanted, const std::vector<double>& weights, int loss_kind,
                          const std::vector<double>& parameters, double eps, bool teacher_gradient,
                          const std::string& name) {
  check_on_cpu(grad, "grad");
  check_on_cpu(saved, "saved");
  for (const Tensor& tensor : tensors) check_on_cpu(tensor, "stage");
  const Stages stages = stages_of(tensors);
  const Distillation how = distillation_of(weights, loss_kind, parameters, eps, teacher_gradient);
  const Regime regime = regime_of(name, how.loss);
  check_count(stages, weights, teacher_gradient || regime != Regime::sample);
  if (wanted.size() != tensors.size()) refuse("wanted must tell of each stage");
  std::vector<Features> outs;
  py::list results;
  for (std::size_t k = 0; k < tensors.size(); ++k) {
    if (!wanted[k]) {
      outs.push_back({});
      results.append(py::none());
      continue;
    }
    const DType dtype = stages.features[k].dtype;
    const int64_t n = stages.shape.samples, width = stages.features[k].features;
    const NewTensor out = new_tensor(tensors[k], dtype, sizes_like(tensors[k], {n, width}));
    outs.push_back({out.data, dtype, width, product(n, width, 1), width});
    results.append(out.object);
  }
  const int64_t count = saved_elements(regime, stages, static_cast<int64_t>(weights.size()));
  const bool wide = dtype_of(grad, "grad") == DType::float64;
  if (stages.wide() && !wide) refuse("grad is not of the compute type");
  with_compute_type(wide, [&](auto c) {
    using C = decltype(c);
    const C* of_losses = elements_of<C>(grad, stages.shape.groups, "grad");
    switch (regime) {
      case Regime::sample: {
        const C* slots = elements_of<C>(saved, count, "saved");
        py::gil_scoped_release unlocked;
        cpu::distill_backward<C>(of_losses, slots, stages.features, outs, stages.shape);
        break;
      }
      case Regime::streamed: {
        const C* numbers = elements_of<C>(saved, count, "saved");
        py::gil_scoped_release unlocked;
        cpu::distill_streamed_backward<C>(of_losses, numbers, stages.features, outs, stages.shape, how);
        break;
      }
      case Regime::feature: {
        const double* moments = elements_of<double>(saved, count, "saved");
        py::gil_scoped_release unlocked;
        cpu::distill_feature_backward<C>(of_losses, moments, stages.features, outs, stages.shape, how);
      }
    }
  });
  return results;
}

#ifdef ICSD_CUDA
namespace device {

// The stream is a cudaStream_t of the current device.
void* stream_at(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

void* memory_of(const Tensor& workspace) { return data_of<void>(workspace, 1, "workspace"); }

Stages checked_stages(const std::vector<Tensor>& tensors) {
  Stages stages = stages_of(tensors);
  if (stages.shape.samples > std::numeric_limits<int>::max() / 2) refuse("more samples than 32 bits count");
  if (tensors.size() > cuda::kMaxStages) {
    refuse("a call takes at most " + std::to_string(cuda::kMaxStages) + " stages, got " + std::to_string(tensors.size()) +
           "; add the losses of several calls up");
  }
  return stages;
}

// Memory that a call reads or writes.
struct Block {
  const char* name;
  std::uintptr_t begin, end;
};

Block block_of(const Features& x, Shape shape, const char* name) {
  const auto begin = reinterpret_cast<std::uintptr_t>(x.data);
  return {name, begin, begin + extent(x, shape) * size_of(x.dtype)};
}

// What is written must overlap neither what is read nor anything else that is written.
void check_apart(const std::vector<Block>& written, const std::vector<Block>& read) {
  const auto overlap = [](const Block& a, const Block& b) { return a.begin < b.end && b.begin < a.end; };
  for (std::size_t k = 0; k < written.size(); ++k) {
    for (const Block& other : read) {
      if (overlap(written[k], other)) refuse(std::string(written[k].name) + " overlaps its input, " + other.name);
    }
    for (std::size_t other = 0; other < k; ++other) {
      if (overlap(written[k], written[other])) {
        refuse(std::string(written[k].name) + " overlaps another result, " + written[other].name);
      }
    }
  }
}

// Where a result of so many samples goes: it is like what it is computed from, and its samples do not overlap each other.
Features result_of(const Tensor& tensor, int64_t samples, const Batch& x) {
  const auto [out, shape] = batch_of(tensor, "out");
  if (out.dtype != x.features.dtype || out.features != x.features.features || shape.samples != samples ||
      shape.groups != x.shape.groups) {
    refuse("out does not match its input");
  }
  const bool dense = (samples <= 1 || out.sample_stride >= out.features) &&
                     (shape.groups <= 1 || out.group_stride >= product(samples, out.sample_stride, 1));
  if (!dense && extent(out, shape)) refuse("out overlaps itself");
  return out;
}

// Null data where no gradient is wanted.
std::vector<Features> results_of(const std::vector<std::optional<Tensor>>& tensors, const Stages& stages) {
  if (tensors.size() != stages.features.size()) refuse("one result for each stage is needed");
  std::vector<Features> outs;
  std::vector<Block> written, read;
  for (std::size_t k = 0; k < tensors.size(); ++k) {
    const Batch stage{stages.features[k], stages.shape};
    outs.push_back(tensors[k] ? result_of(*tensors[k], stages.shape.samples, stage) : Features{});
    written.push_back(block_of(outs[k], stages.shape, "out"));
    read.push_back(block_of(stage.features, stages.shape, "stage"));
  }
  check_apart(written, read);
  return outs;
}

template <class C>
C* saved_of(const std::optional<Tensor>& saved, int64_t count) {
  return saved ? elements_of<C>(*saved, count, "saved") : nullptr;
}

std::size_t gram_workspace(const Tensor& x) {
  const Stages stages = checked_stages({x});
  return cuda::gram_workspace(stages.features[0], stages.shape);
}

void gram(const Tensor& x, const Tensor& out, const Tensor& workspace, std::uintptr_t stream) {
  const Stages stages = checked_stages({x});
  const auto [groups, n] = stages.shape;
  const int64_t elements = product(groups, n, n);
  with_compute_type(stages.wide(), [&](auto c) {
    using C = decltype(c);
    C* matrix = elements_of<C>(out, elements, "out");
    cuda::gram<C>(stages.features[0], stages.shape, matrix, memory_of(workspace), stream_at(stream));
  });
}

void combine(const Tensor& matrix, const Tensor& x, const Tensor& out, std::uintptr_t stream) {
  const Stages stages = checked_stages({x});
  const Batch batch{stages.features[0], stages.shape};
  const int64_t outputs = outputs_of(matrix, batch);
  const Features result = result_of(out, outputs, batch);
  with_compute_type(stages.wide(), [&](auto c) {
    using C = decltype(c);
    const auto [groups, n] = batch.shape;
    C* elements = elements_of<C>(matrix, product(groups, outputs, n), "matrix");
    const Features factors{elements, kDType<C>, n, outputs * n, n};
    check_apart({block_of(result, {groups, outputs}, "out")},
                {block_of(batch.features, batch.shape, "x"), block_of(factors, {groups, outputs}, "matrix")});
    cuda::combine<C>(elements, outputs, batch.features, result, batch.shape, stream_at(stream));
  });
}

std::size_t distill_workspace(const std::vector<Tensor>& tensors, int loss_kind, bool save) {
  const Stages stages = checked_stages(tensors);
  return with_compute_type(stages.wide(), [&](auto c) {
    return cuda::distill_workspace<decltype(c)>(stages.features, stages.shape, static_cast<LossKind>(loss_kind), save);
  });
}

void distill(const std::vector<Tensor>& tensors, const std::vector<double>& weights, int loss_kind,
             const std::vector<double>& parameters, double eps, bool teacher_gradient, const Tensor& loss,
             const std::optional<Tensor>& saved, const Tensor& workspace, std::uintptr_t stream) {
  const Stages stages = checked_stages(tensors);
  check_count(stages, weights, true);
  const Distillation how = distillation_of(weights, loss_kind, parameters, eps, teacher_gradient);
  const auto students = static_cast<int64_t>(weights.size());
  with_compute_type(stages.wide(), [&](auto c) {
    using C = decltype(c);
    C* losses = elements_of<C>(loss, stages.shape.groups, "loss");
    C* slots = saved_of<C>(saved, saved_elements(Regime::sample, stages, students));
    cuda::distill<C>(stages.features, stages.shape, how, losses, slots, memory_of(workspace), stream_at(stream));
  });
}

void distill_backward(const Tensor& grad, const Tensor& saved, const std::vector<Tensor>& tensors,
                      const std::vector<std::optional<Tensor>>& results, const std::vector<double>& weights,
                      bool teacher_gradient, std::uintptr_t stream) {
  const Stages stages = checked_stages(tensors);
  check_count(stages, weights, teacher_gradient);
  const std::vector<Features> outs = results_of(results, stages);
  const auto students = static_cast<int64_t>(weights.size());
  const bool wide = dtype_of(grad, "grad") == DType::float64;
  if (stages.wide() && !wide) refuse("grad is not of the compute type");
  with_compute_type(wide, [&](auto c) {
    using C = decltype(c);
    const C* of_losses = elements_of<C>(grad, stages.shape.groups, "grad");
    const C* slots = elements_of<C>(saved, saved_elements(Regime::sample, stages, students), "saved");
    cuda::distill_backward<C>(of_losses, slots, stages.features, outs, stages.shape, stream_at(stream));
  });
}

Stages feature_stages(const std::vector<Tensor>& tensors) {
  Stages stages = checked_stages(tensors);
  for (const Features& stage : stages.features) {
    if (stage.dtype != stages.features[0].dtype) refuse("stages of feature space are of one type");
    if (stage.features > std::numeric_limits<int>::max() / 2) refuse("more features than 32 bits count");
  }
  saved_elements(Regime::feature, stages, 0);  // may be refused
  return stages;
}

std::size_t feature_workspace(const std::vector<Tensor>& tensors, bool save) {
  const Stages stages = feature_stages(tensors);
  return cuda::feature_workspace(stages.features, stages.shape, save);
}

void distill_feature(const std::vector<Tensor>& tensors, const std::vector<double>& weights, int loss_kind,
                     const std::vector<double>& parameters, double eps, bool teacher_gradient, const Tensor& loss,
                     const std::optional<Tensor>& saved, const Tensor& workspace, std::uintptr_t stream) {
  const Stages stages = feature_stages(tensors);
  check_count(stages, weights, true);
  const Distillation how = distillation_of(weights, loss_kind, parameters, eps, teacher_gradient);
  const Regime regime = regime_of("feature", how.loss);
  with_compute_type(stages.wide(), [&](auto c) {
    using C = decltype(c);
    C* losses = elements_of<C>(loss, stages.shape.groups, "loss");
    double* moments = saved_of<double>(saved, saved_elements(regime, stages, 0));
    cuda::distill_feature<C>(stages.features, stages.shape, how, losses, moments, memory_of(workspace), stream_at(stream));
  });
}

std::size_t feature_backward_workspace(const std::vector<Tensor>& tensors) {
  const Stages stages = feature_stages(tensors);
  return cuda::feature_backward_workspace(stages.features, stages.shape);
}

void distill_feature_backward(const Tensor& grad, const Tensor& saved, const std::vector<Tensor>& tensors,
                              const std::vector<std::optional<Tensor>>& results, const std::vector<double>& weights,
                              int loss_kind, const std::vector<double>& parameters, double eps, bool teacher_gradient,
                              const Tensor& workspace, std::uintptr_t stream) {
  const Stages stages = feature_stages(tensors);
  check_count(stages, weights, true);
  const Distillation how = distillation_of(weights, loss_kind, parameters, eps, teacher_gradient);
  const Regime regime = regime_of("feature", how.loss);
  const std::vector<Features> outs = results_of(results, stages);
  with_compute_type(stages.wide(), [&](auto c) {
    using C = decltype(c);
    const C* of_losses = elements_of<C>(grad, stages.shape.groups, "grad");
    const double* moments = elements_of<double>(saved, saved_elements(regime, stages, 0), "saved");
    cuda::distill_feature_backward<C>(of_losses, moments, stages.features, outs, stages.shape, how, memory_of(workspace),
                                      stream_at(stream));
  });
}

// Of one compute type.
Stages streamed_stages(const std::vector<Tensor>& tensors) {
  Stages stages = checked_stages(tensors);
  for (const Features& stage : stages.features) {
    if ((stage.dtype == DType::float64) != stages.wide()) refuse("float64 streams with float64 alone");
  }
  return stages;
}

std::size_t streamed_workspace(const std::vector<Tensor>& tensors, bool teacher_gradient, bool save, int64_t band_bytes) {
  const Stages stages = streamed_stages(tensors);
  return with_compute_type(stages.wide(), [&](auto c) {
    return cuda::streamed_workspace<decltype(c)>(stages.features, stages.shape, teacher_gradient, save, band_bytes);
  });
}

void distill_streamed(const std::vector<Tensor>& tensors, const std::vector<double>& weights, int loss_kind,
                      const std::vector<double>& parameters, double eps, bool teacher_gradient, const Tensor& loss,
                      const std::optional<Tensor>& saved, int64_t band_bytes, const Tensor& workspace,
                      std::uintptr_t stream) {
  const Stages stages = streamed_stages(tensors);
  check_count(stages, weights, true);
  const Distillation how = distillation_of(weights, loss_kind, parameters, eps, teacher_gradient);
  with_compute_type(stages.wide(), [&](auto c) {
    using C = decltype(c);
    C* losses = elements_of<C>(loss, stages.shape.groups, "loss");
    C* numbers = saved_of<C>(saved, saved_elements(Regime::streamed, stages, 0));
    cuda::distill_streamed<C>(stages.features, stages.shape, how, losses, numbers, band_bytes, memory_of(workspace),
                              stream_at(stream));
  });
}

void distill_streamed_backward(const Tensor& grad, const Tensor& saved, const std::vector<Tensor>& tensors,
                               const std::vector<std::optional<Tensor>>& results, const std::vector<double>& weights,
                               int loss_kind, const std::vector<double>& parameters, double eps, bool teacher_gradient,
                               int64_t band_bytes, const Tensor& workspace, std::uintptr_t stream) {
  const Stages stages = streamed_stages(tensors);
  check_count(stages, weights, true);
  const Distillation how = distillation_of(weights, loss_kind, parameters, eps, teacher_gradient);
  const std::vector<Features> outs = results_of(results, stages);
  with_compute_type(stages.wide(), [&](auto c) {
    using C = decltype(c);
    const C* of_losses = elements_of<C>(grad, stages.shape.groups, "grad");
    const C* numbers = elements_of<C>(saved, saved_elements(Regime::streamed, stages, 0), "saved");
    cuda::distill_streamed_backward<C>(of_losses, numbers, stages.features, outs, stages.shape, how, band_bytes,
                                       memory_of(workspace), stream_at(stream));
  });
}

}  // namespace device
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Fused kernels on tensors; use icsd.ops, which checks what they hold and differentiates.";
  m.def("gram", &gram, py::arg("x"));
  m.def("combine", &combine, py::arg("matrix"), py::arg("x"));
  m.def("distill", &distill, py::arg("stages"), py::arg("save"), py::arg("weights"), py::arg("loss_kind"),
        py::arg("parameters"), py::arg("eps"), py::arg("teacher_gradient"), py::arg("regime"));
  m.def("distill_backward", &distill_backward, py::arg("grad"), py::arg("saved"), py::arg("stages"), py::arg("wanted"),
        py::arg("weights"), py::arg("loss_kind"), py::arg("parameters"), py::arg("eps"), py::arg("teacher_gradient"),
        py::arg("regime"));
  m.def("empty_cache", &cpu::empty_cache);
#ifdef ICSD_CUDA
  py::module_ on_device = m.def_submodule("cuda", "The same on the current CUDA device, enqueued on a stream.");
  on_device.def("gram_workspace", &device::gram_workspace, py::arg("x"));
  on_device.def("gram", &device::gram, py::arg("x"), py::arg("out"), py::arg("workspace"), py::arg("stream"));
  on_device.def("combine", &device::combine, py::arg("matrix"), py::arg("x"), py::arg("out"), py::arg("stream"));
  on_device.def("distill_workspace", &device::distill_workspace, py::arg("stages"), py::arg("loss_kind"), py::arg("save"));
  on_device.def("distill", &device::distill, py::arg("stages"), py::arg("weights"), py::arg("loss_kind"),
                py::arg("parameters"), py::arg("eps"), py::arg("teacher_gradient"), py::arg("loss"), py::arg("saved"),
                py::arg("workspace"), py::arg("stream"));
  on_device.def("distill_backward", &device::distill_backward, py::arg("grad"), py::arg("saved"), py::arg("stages"),
                py::arg("outs"), py::arg("weights"), py::arg("teacher_gradient"), py::arg("stream"));
  on_device.def("feature_workspace", &device::feature_workspace, py::arg("stages"), py::arg("save"));
  on_device.def("distill_feature", &device::distill_feature, py::arg("stages"), py::arg("weights"), py::arg("loss_kind"),
                py::arg("parameters"), py::arg("eps"), py::arg("teacher_gradient"), py::arg("loss"), py::arg("saved"),
                py::arg("workspace"), py::arg("stream"));
  on_device.def("feature_backward_workspace", &device::feature_backward_workspace, py::arg("stages"));
  on_device.def("distill_feature_backward", &device::distill_feature_backward, py::arg("grad"), py::arg("saved"),
                py::arg("stages"), py::arg("outs"), py::arg("weights"), py::arg("loss_kind"), py::arg("parameters"),
                py::arg("eps"), py::arg("teacher_gradient"), py::arg("workspace"), py::arg("stream"));
  on_device.def("streamed_workspace", &device::streamed_workspace, py::arg("stages"), py::arg("teacher_gradient"),
                py::arg("save"), py::arg("band_bytes"));
  on_device.def("distill_streamed", &device::distill_streamed, py::arg("stages"), py::arg("weights"), py::arg("loss_kind"),
                py::arg("parameters"), py::arg("eps"), py::arg("teacher_gradient"), py::arg("loss"), py::arg("saved"),
                py::arg("band_bytes"), py::arg("workspace"), py::arg("stream"));
  on_device.def("distill_streamed_backward", &device::distill_streamed_backward, py::arg("grad"), py::arg("saved"),
                py::arg("stages"), py::arg("outs"), py::arg("weights"), py::arg("loss_kind"), py::arg("parameters"),
                py::arg("eps"), py::arg("teacher_gradient"), py::arg("band_bytes"), py::arg("workspace"),
                py::arg("stream"));
  on_device.def("launches", &cuda::launches, "Kernels launched by this process so far.");
  on_device.def("devices", [] {
    const cuda::Devices devices = cuda::devices();
    return py::make_tuple(devices.count, devices.error);
  });
#endif
  m.def("cpu_isa", [] { return cpu::kernels().isa; });
  m.attr("INTERFACE") = 1;  // to be raised, with that of icsd/ops/cpu.py, where what a function takes or returns changes
  m.attr("build") = py::dict(py::arg("compiler") = ICSD_COMPILER, py::arg("cpu") = ICSD_CPU_ISAS,
                             py::arg("cuda") = ICSD_CUDA_ARCHITECTURES);
}

}  // namespace icsd
