// Tensors as arguments of native functions.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "binding/dlpack.h"
#include "core/dtype.h"

namespace icsd {

// A tensor during a call: its memory belongs to the Python object.
struct Tensor : dlpack::DLTensor {
  PyObject* object;
  const dlpack::DLPackExchangeAPI* api;
};

// A new tensor and its memory.
struct NewTensor {
  pybind11::object object;
  void* data;
};

// Returns the exchange table of the object's type, or null if it has none that fits.
inline const dlpack::DLPackExchangeAPI* exchange_api_of(pybind11::handle object) {
  static PyObject* const name = PyUnicode_InternFromString(dlpack::kExchangeAttribute);
  PyObject* const capsule = PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())), name);
  if (!capsule) {
    PyErr_Clear();
    return nullptr;
  }
  const void* pointer = PyCapsule_GetPointer(capsule, dlpack::kExchangeCapsule);
  Py_DECREF(capsule);  // the type holds it, too
  if (!pointer) throw pybind11::error_already_set();
  const auto* header = static_cast<const dlpack::DLPackExchangeAPIHeader*>(pointer);
  while (header && header->version.major != dlpack::kMajorVersion) header = header->prev_api;
  return reinterpret_cast<const dlpack::DLPackExchangeAPI*>(header);
}

// Returns whether an object is a plain real tensor whose elements are what its memory holds. Subclasses can have them
// elsewhere; batched tensors and zero tensors have no memory; a lazy negation stands for the negative of its memory.
inline bool is_readable(PyObject* object) {
  static PyObject* const is_negated = PyUnicode_InternFromString("is_neg");
  static const pybind11::handle torch = pybind11::module_::import("torch").release();
  static const pybind11::handle tensor = torch.attr("Tensor").cast<pybind11::object>().release();
  static const pybind11::handle parameter = torch.attr("nn").attr("Parameter").cast<pybind11::object>().release();
  auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != tensor.ptr() && type != parameter.ptr()) return false;
  const dlpack::DLPackExchangeAPI* const api = exchange_api_of(object);
  dlpack::DLTensor memory{};
  if (!api || !api->dltensor_from_py_object_no_sync || api->dltensor_from_py_object_no_sync(object, &memory)) {
    PyErr_Clear();
    return false;
  }
  bool is_empty = false;
  for (int dim = 0; dim < memory.ndim; ++dim) is_empty |= memory.shape[dim] == 0;
  if (!memory.data && !is_empty) return false;
  PyObject* arguments[] = {nullptr, object};  // the first is a place for the callee
  const auto negated = pybind11::reinterpret_steal<pybind11::object>(
      PyObject_VectorcallMethod(is_negated, arguments + 1, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
  if (!negated) throw pybind11::error_already_set();
  return negated.ptr() == Py_False;
}

inline bool reads(const pybind11::sequence& tensors) {
  const auto items = pybind11::reinterpret_steal<pybind11::object>(PySequence_Fast(tensors.ptr(), "a sequence"));
  if (!items) throw pybind11::error_already_set();
  PyObject** const first = PySequence_Fast_ITEMS(items.ptr());
  return std::all_of(first, first + PySequence_Fast_GET_SIZE(items.ptr()), is_readable);
}

inline dlpack::DLDataType dlpack_type_of(DType dtype) {
  const auto bits = static_cast<std::uint8_t>(8 * size_of(dtype));
  return {dtype == DType::bfloat16 ? dlpack::kDLBfloat : dlpack::kDLFloat, bits, 1};
}

}  // namespace icsd

namespace pybind11::detail {

template <>
struct type_caster<icsd::Tensor> {
  PYBIND11_TYPE_CASTER(icsd::Tensor, const_name("Tensor"));

  bool load(handle object, bool) {
    value.object = object.ptr();
    value.api = icsd::exchange_api_of(object);
    if (!value.api || !value.api->dltensor_from_py_object_no_sync) return false;
    if (value.api->dltensor_from_py_object_no_sync(object.ptr(), &value)) throw error_already_set();
    return true;
  }
};

}  // namespace pybind11::detail
