// Tensors as arguments and as results of native functions.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "binding/dlpack.h"
#include "core/dtype.h"
#include "cpu/memory.h"

namespace icsd {

// What a Python object shows of itself during a call.
struct Tensor : dlpack::Tensor {
  const dlpack::Exchange* framework;
};

// The functions of an object's framework, or null if it has none.
inline const dlpack::Exchange* framework_of(pybind11::handle object) {
  static PyObject* const name = PyUnicode_InternFromString(dlpack::kAttribute);
  PyObject* const capsule = PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())), name);
  if (!capsule) {
    PyErr_Clear();
    return nullptr;
  }
  const auto* newest = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule, dlpack::kCapsule));
  Py_DECREF(capsule);  // the type holds it, too
  if (!newest) throw pybind11::error_already_set();
  for (; newest && newest->version.major != dlpack::kMajor; newest = newest->previous) continue;
  return newest;
}

// New memory on the CPU, and the tensor that owns it.
struct NewTensor {
  pybind11::object object;
  void* data;
};

// A contiguous tensor of the framework of `like`. Throws std::bad_alloc.
inline NewTensor new_tensor(const Tensor& like, DType dtype, const std::vector<std::int64_t>& sizes) {
  struct Owner {
    dlpack::ManagedTensor managed;
    cpu::Allocation memory;
    std::vector<std::int64_t> sizes, strides;
  };
  const auto element = static_cast<std::int64_t>(size_of(dtype));
  std::int64_t bytes = element;
  std::vector<std::int64_t> strides(sizes.size());
  for (std::size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = bytes / element;
    if (__builtin_mul_overflow(bytes, sizes[dim], &bytes)) throw std::bad_alloc();
  }
  auto owner = std::make_unique<Owner>(
      Owner{{}, cpu::Allocation(static_cast<std::size_t>(bytes)), sizes, std::move(strides)});
  const dlpack::ElementType type{dtype == DType::bfloat16 ? dlpack::kBfloat : dlpack::kFloat,
                                 static_cast<std::uint8_t>(8 * element), 1};
  owner->managed = {{dlpack::kMajor, 0},
                    owner.get(),
                    [](dlpack::ManagedTensor* managed) { delete static_cast<Owner*>(managed->context); },
                    0,
                    {owner->memory.data(), {dlpack::kCpu, 0}, static_cast<std::int32_t>(sizes.size()), type,
                     owner->sizes.data(), owner->strides.data(), 0}};
  void *const data = owner->memory.data(), *object = nullptr;
  if (like.framework->take(&owner.release()->managed, &object)) throw pybind11::error_already_set();
  return {pybind11::reinterpret_steal<pybind11::object>(static_cast<PyObject*>(object)), data};
}

}  // namespace icsd

namespace pybind11::detail {

template <>
struct type_caster<icsd::Tensor> {
  PYBIND11_TYPE_CASTER(icsd::Tensor, const_name("Tensor"));

  bool load(handle object, bool) {
    value.framework = icsd::framework_of(object);
    if (!value.framework) return false;
    if (value.framework->view(object.ptr(), &value)) throw error_already_set();
    return true;
  }
};

}  // namespace pybind11::detail
