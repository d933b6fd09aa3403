// `icsd._native.cpu`.
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "binding/functions.h"
#include "cpu/banks.h"
#include "cpu/feature.h"
#include "cpu/kernels/kernels.h"
#include "cpu/runtime/memory.h"
#include "cpu/sample.h"
#include "cpu/streamed.h"

namespace py = pybind11;

namespace icsd {
namespace {

// OpenMP has a number of threads for each thread of the program. PyTorch sets it for a thread that asks for it first.
void take_number_of_threads() {
  thread_local bool taken = false;
  if (taken) return;
  py::module_::import("torch").attr("get_num_threads")();
  taken = true;
}

// Kernels run without the interpreter's lock. New tensors lie in the memory of cpu/memory.h.
class CPU {
 public:
  static dlpack::DLDevice device_of(const Tensor&) { return {dlpack::kDLCPU, 0}; }

  CPU(const Tensor& x, const Inputs&) : api_(*x.api) { take_number_of_threads(); }

  void check_regime(const Inputs&, Regime) const {}

  static int64_t saved_pitch(int64_t samples) { return samples + 1; }
  static int64_t feature_elements(const Inputs& inputs) { return covariance_elements(inputs.features); }

  NewTensor new_tensor(DType dtype, const std::vector<int64_t>& sizes) const;

  template <class C>
  void gram(const Features& x, Shape shape, C* out) const {
    py::gil_scoped_release unlocked;
    cpu::gram<C>(x, shape, out);
  }

  template <class C>
  void combine(const C* matrix, int64_t outputs, const Features& x, const Features& out, Shape shape) const {
    py::gil_scoped_release unlocked;
    cpu::combine<C>(matrix, outputs, x, out, shape);
  }

  template <class C>
  void distill(const Inputs& inputs, const Spec& spec, C* loss, void* saved) const {
    py::gil_scoped_release unlocked;
    const auto& [features, shape] = inputs;
    switch (spec.regime) {
      case Regime::sample: return cpu::distill_sample<C>(features, shape, spec, loss, static_cast<C*>(saved));
      case Regime::feature: return cpu::distill_feature<C>(features, shape, spec, loss, static_cast<double*>(saved));
      case Regime::streamed: return cpu::distill_streamed<C>(features, shape, spec, loss, static_cast<C*>(saved));
    }
  }

  template <class C>
  void distill_backward(const C* grad, const void* saved, const Inputs& inputs, const std::vector<Features>& gradients,
                        const Spec& spec) const {
    py::gil_scoped_release unlocked;
    const auto& [features, shape] = inputs;
    switch (spec.regime) {
      case Regime::sample:
        return cpu::distill_sample_backward<C>(grad, static_cast<const C*>(saved), features, gradients, shape);
      case Regime::feature:
        return cpu::distill_feature_backward<C>(grad, static_cast<const double*>(saved), features, gradients, shape,
                                                spec);
      case Regime::streamed:
        return cpu::distill_streamed_backward<C>(grad, static_cast<const C*>(saved), features, gradients, shape, spec);
    }
  }

 private:
  const dlpack::DLPackExchangeAPI& api_;
};

NewTensor CPU::new_tensor(DType dtype, const std::vector<int64_t>& sizes) const {
  struct Owner {
    dlpack::DLManagedTensorVersioned managed;
    cpu::Allocation memory;
    std::vector<int64_t> sizes, strides;
  };
  const auto element = static_cast<int64_t>(size_of(dtype));
  int64_t bytes = element;
  std::vector<int64_t> strides(sizes.size());
  for (std::size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = bytes / element;
    if (__builtin_mul_overflow(bytes, sizes[dim], &bytes)) throw std::bad_alloc();
  }
  auto owner =
      std::make_unique<Owner>(Owner{{}, cpu::Allocation(static_cast<std::size_t>(bytes)), sizes, std::move(strides)});
  void* const data = owner->memory.data();
  owner->managed = {{dlpack::kMajorVersion, 0},
                    owner.get(),
                    [](dlpack::DLManagedTensorVersioned* self) { delete static_cast<Owner*>(self->manager_ctx); },
                    0,
                    {data,
                     {dlpack::kDLCPU, 0},
                     static_cast<std::int32_t>(sizes.size()),
                     dlpack_type_of(dtype),
                     owner->sizes.data(),
                     owner->strides.data(),
                     0}};
  void* object = nullptr;
  if (api_.managed_tensor_to_py_object_no_sync(&owner.release()->managed, &object)) throw py::error_already_set();
  return {py::reinterpret_steal<py::object>(static_cast<PyObject*>(object)), data};
}

// Checks the arguments of the passes over exponents and calls run(Exponents<C>, BankRow<C>*).
template <class Run>
void with_exponents(const Tensor& student, const Tensor& teacher, const Tensor& rows, const Run& run) {
  const dlpack::DLDevice device = CPU::device_of(student);
  for (const Tensor* tensor : {&student, &teacher, &rows}) check_device(*tensor, device, "exponents and rows");
  if (student.ndim < 1 || rows.ndim < 1 || rows.shape[rows.ndim - 1] != cpu::kBankRow) {
    refuse("rows must have " + std::to_string(cpu::kBankRow) + " numbers for each row of exponents");
  }
  int64_t count = 1;
  for (int dim = 0; dim + 1 < rows.ndim; ++dim) count = product(count, rows.shape[dim], 1);
  const int64_t columns = student.shape[student.ndim - 1], elements = product(count, columns, 1);
  take_number_of_threads();
  with_compute_type(dtype_of(student, "exponents") == DType::float64, [&](auto c) {
    using C = decltype(c);
    const cpu::Exponents<C> exponents{elements_of<C>(student, elements, "student"),
                                      elements_of<C>(teacher, elements, "teacher"), count, columns};
    auto* sums = reinterpret_cast<cpu::BankRow<C>*>(elements_of<C>(rows, product(count, cpu::kBankRow, 1), "rows"));
    py::gil_scoped_release unlocked;
    run(exponents, sums);
  });
}

void add_exponentials(const Tensor& student, const Tensor& teacher, const Tensor& rows, bool rising) {
  with_exponents(student, teacher, rows,
                 [&](const auto& exponents, auto* sums) { cpu::add_exponentials(exponents, sums, rising); });
}

void exponent_gradients(const Tensor& student, const Tensor& teacher, const Tensor& rows, double student_factor,
                        double teacher_factor) {
  with_exponents(student, teacher, rows, [&](const auto& exponents, auto* sums) {
    using C = std::remove_pointer_t<decltype(exponents.student)>;
    cpu::exponent_gradients<C>(exponents, sums, static_cast<C>(student_factor), static_cast<C>(teacher_factor));
  });
}

}  // namespace

void define_cpu(py::module_ module) {
  using py::arg;
  define_functions<CPU>(module);
  module.def("add_exponentials", &add_exponentials, arg("student"), arg("teacher"), arg("rows"), arg("rising"));
  module.def("exponent_gradients", &exponent_gradients, arg("student"), arg("teacher"), arg("rows"),
             arg("student_factor"), arg("teacher_factor"));
}

}  // namespace icsd
