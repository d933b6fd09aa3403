// Tensors as arguments of native functions.
#pragma once

#include <pybind11/pybind11.h>

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
