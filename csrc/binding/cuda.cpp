// `icsd._native.cuda`.
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "binding/functions.h"
#include "cuda/banks.h"
#include "cuda/operator.h"

namespace py = pybind11;

namespace icsd {
namespace {

// The kernels' memory is on this kind of device. In the emulator of tests/cuda it is the CPU's.
#ifdef ICSD_EMULATOR
constexpr bool kEmulated = true;
constexpr dlpack::DLDeviceType kDeviceType = dlpack::kDLCPU;
#else
constexpr bool kEmulated = false;
constexpr dlpack::DLDeviceType kDeviceType = dlpack::kDLCUDA;
#endif

// The emulator shows what reads memory that nothing was written to: it is NaN.
void* fill_if_emulated(void* data, std::size_t bytes) {
  if (kEmulated && bytes) std::memset(data, 0xff, bytes);
  return data;
}

// Workspaces of one call, from the allocator of the tensors' framework. They are given back at the end of the call,
// while its kernels may still be running: that allocator gives them only to kernels that come later on the same stream.
class Workspaces {
 public:
  Workspaces(const dlpack::DLPackExchangeAPI& api, dlpack::DLDevice device) : api_(api), device_(device) {}
  ~Workspaces() {
    for (dlpack::DLManagedTensorVersioned* workspace : workspaces_) workspace->deleter(workspace);
  }
  Workspaces(const Workspaces&) = delete;

  void* allocate(std::size_t bytes) {
    if (!bytes) return nullptr;
    int64_t size = static_cast<int64_t>(bytes);
    dlpack::DLTensor prototype{nullptr, device_, 1, {dlpack::kDLUInt, 8, 1}, &size, nullptr, 0};
    dlpack::DLManagedTensorVersioned* workspace = nullptr;
    std::string error;
    const auto set_error = [](void* to, const char*, const char* message) { *static_cast<std::string*>(to) = message; };
    if (api_.managed_tensor_allocator(&prototype, &workspace, &error, set_error)) throw std::runtime_error(error);
    workspaces_.push_back(workspace);
    const dlpack::DLTensor& tensor = workspace->dl_tensor;
    return fill_if_emulated(static_cast<char*>(tensor.data) + tensor.byte_offset, bytes);
  }

 private:
  const dlpack::DLPackExchangeAPI& api_;
  dlpack::DLDevice device_;
  std::vector<dlpack::DLManagedTensorVersioned*> workspaces_;
};

// The current stream of the emulator, unless the exchange table has one. CPU tensors have none.
void* emulated_stream = nullptr;

void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  if (x.api->current_work_stream(x.device.device_type, x.device.device_id, &stream)) throw py::error_already_set();
  return kEmulated && !stream ? emulated_stream : stream;
}

// Runs kernels on the current stream of the tensors' device.
class CUDA {
 public:
  static dlpack::DLDevice device_of(const Tensor& x) { return {kDeviceType, x.device.device_id}; }

  CUDA(const Tensor& x, const Inputs& inputs)
      : x_(x),
        guard_(x.device.device_id),
        workspaces_(*x.api, x.device),
        context_{current_stream(x), [this](std::size_t bytes) { return workspaces_.allocate(bytes); }} {
    if (inputs.shape.samples > kMost) refuse("more samples than 32 bits count");
    if (inputs.features.size() > cuda::kMaxStages) {
      refuse("a call takes at most " + std::to_string(cuda::kMaxStages) + " inputs, got " +
             std::to_string(inputs.features.size()) + "; add the losses of several calls up");
    }
  }

  void check_regime(const Inputs& inputs, Regime regime) const {
    for (const Features& x : inputs.features) {
      if (regime == Regime::feature && x.dtype != inputs.features[0].dtype) {
        refuse("the regime feature takes inputs of one type");
      }
      if (regime == Regime::feature && x.dim > kMost) refuse("more features than 32 bits count");
      if (regime == Regime::streamed && (x.dtype == DType::float64) != inputs.is_double()) {
        refuse("the regime streamed takes float64 with float64 only");
      }
    }
  }

  static int64_t saved_pitch(int64_t samples) { return cuda::saved_pitch(samples); }
  static int64_t feature_elements(const Inputs& inputs) {
    return cuda::feature_elements(inputs.features, inputs.shape.samples);
  }

  NewTensor new_tensor(DType dtype, const std::vector<int64_t>& sizes) const;

  template <class C>
  void gram(const Features& x, Shape shape, C* out) const {
    cuda::gram<C>(x, shape, out, context_);
  }

  template <class C>
  void combine(const C* matrix, int64_t outputs, const Features& x, const Features& out, Shape shape) const {
    if (outputs > kMost) refuse("more outputs than 32 bits count");
    cuda::combine<C>(matrix, outputs, x, out, shape, context_);
  }

  template <class C>
  void distill_to_banks(const Inputs& queries, const Inputs& banks, const Spec& spec, C* loss,
                        const std::vector<Features>& gradients) const {
    if (banks.shape.samples > kMost) refuse("more samples than 32 bits count");
    cuda::distill_to_banks<C>({queries.features, queries.shape.samples}, {banks.features, banks.shape.samples},
                              queries.shape.groups, spec, loss, gradients, context_);
  }

  template <class C>
  void distill(const Inputs& inputs, const Spec& spec, C* loss, void* saved) const {
    const auto& [features, shape] = inputs;
    switch (spec.regime) {
      case Regime::sample:
        return cuda::distill_sample<C>(features, shape, spec, loss, static_cast<C*>(saved), context_);
      case Regime::feature:
        return cuda::distill_feature<C>(features, shape, spec, loss, static_cast<double*>(saved), context_);
      case Regime::streamed:
        return cuda::distill_streamed<C>(features, shape, spec, loss, static_cast<C*>(saved), context_);
    }
  }

  template <class C>
  void distill_backward(const C* grad, const void* saved, const Inputs& inputs, const std::vector<Features>& gradients,
                        const Spec& spec) const {
    const auto& [features, shape] = inputs;
    switch (spec.regime) {
      case Regime::sample:
        return cuda::distill_sample_backward<C>(grad, static_cast<const C*>(saved), features, gradients, shape,
                                                context_);
      case Regime::feature:
        return cuda::distill_feature_backward<C>(grad, static_cast<const double*>(saved), features, gradients, shape,
                                                 spec, context_);
      case Regime::streamed:
        return cuda::distill_streamed_backward<C>(grad, static_cast<const C*>(saved), features, gradients, shape, spec,
                                                  context_);
    }
  }

 private:
  static constexpr int64_t kMost = std::numeric_limits<int>::max() / 2;

  const Tensor& x_;
  cuda::DeviceGuard guard_;
  Workspaces workspaces_;
  cuda::Context context_;
};

py::object torch_dtype(DType dtype) {
  static PyObject* const torch = PyImport_ImportModule("torch");
  const char* const names[kDTypes] = {"float32", "float64", "bfloat16", "float16"};
  return py::handle(torch).attr(names[static_cast<int>(dtype)]);
}

// Results come from `Tensor.new_empty`, not from the exchange table: PyTorch's allocator does not know a tensor that
// was imported from DLPack, and `Tensor.record_stream` silently does nothing for it. Autograd calls that where a
// gradient goes from one stream to another; without it the memory could be overwritten while it is still being read.
NewTensor CUDA::new_tensor(DType dtype, const std::vector<int64_t>& sizes) const {
  NewTensor result{py::handle(x_.object).attr("new_empty")(sizes, py::arg("dtype") = torch_dtype(dtype)), nullptr};
  const auto tensor = py::cast<Tensor>(result.object);
  int64_t bytes = static_cast<int64_t>(size_of(dtype));
  for (const int64_t size : sizes) bytes *= size;
  result.data = fill_if_emulated(data_of<void>(tensor, 1, "result"), bytes);
  return result;
}

// Checks the features of student and teacher and those of their banks.
void check_banks(const Inputs& queries, const Inputs& banks, const Spec& spec) {
  if (queries.shape.groups != banks.shape.groups) refuse("inputs must have as many groups as their banks");
  if (!queries.shape.samples || !banks.shape.samples) refuse("inputs and banks must have samples");
  for (std::size_t k = 0; k < 2; ++k) {
    if (queries.features[k].dim != banks.features[k].dim) refuse("inputs and their banks must have as many features");
    for (const Inputs* side : {&queries, &banks}) {
      if (side->features[k].dtype != queries.features[0].dtype) refuse("inputs and banks must be of one type");
    }
  }
  if (spec.loss != LossKind::mse && spec.loss != LossKind::kl && spec.loss != LossKind::smooth_l1) {
    refuse(std::string("banks take mse, kl and smooth_l1, got ") + name_of(spec.loss));
  }
  if (spec.parameters.back() == 0) refuse("similarities to banks have no diagonal to leave out");
}

py::tuple distill_to_banks(const std::vector<Tensor>& tensors, const std::vector<bool>& wanted, const Spec& spec) {
  if (tensors.size() != 4 || wanted.size() != 4) refuse("inputs and wanted must be for student, teacher and two banks");
  check_devices(tensors, CUDA::device_of(tensors[0]), "input");
  const Inputs queries = inputs_of({tensors[0], tensors[1]}), banks = inputs_of({tensors[2], tensors[3]});
  check_banks(queries, banks, spec);
  CUDA backend(tensors[0], queries);
  py::list list;
  std::vector<Features> gradients =
      new_gradients(backend, {tensors[0], tensors[1]}, queries, {wanted[0], wanted[1]}, list);
  for (const Features& of_bank :
       new_gradients(backend, {tensors[2], tensors[3]}, banks, {wanted[2], wanted[3]}, list)) {
    gradients.push_back(of_bank);
  }
  return with_compute_type(queries.is_double(), [&](auto c) {
    using C = decltype(c);
    const NewTensor loss = backend.new_tensor(kDType<C>, sizes_like(tensors[0], {}));
    backend.distill_to_banks(queries, banks, spec, static_cast<C*>(loss.data), gradients);
    return py::make_tuple(loss.object, list);
  });
}

}  // namespace

void define_cuda(py::module_ module) {
  define_functions<CUDA>(module);
  module.def("distill_to_banks", &distill_to_banks, py::arg("inputs"), py::arg("wanted"), py::arg("spec"));
  module.def("launches", &cuda::launches);
  module.def("devices", [] {
    const cuda::Devices devices = cuda::devices();
    return py::make_tuple(devices.count, devices.error);
  });
#ifdef ICSD_EMULATOR
  module.def("set_stream", [](std::uintptr_t stream) { emulated_stream = reinterpret_cast<void*>(stream); });
  module.def("set_row_block_bytes", [](int64_t bytes) { cuda::row_block_bytes = bytes; });
  module.def("set_partial_gradient_bytes", [](int64_t bytes) { cuda::partial_gradient_bytes = bytes; });
#endif
}

}  // namespace icsd
