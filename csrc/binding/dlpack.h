// The part of DLPack 1.3 (https://github.com/dmlc/dlpack) that is used here, under its own names. Through its exchange
// table, native code reads a framework's tensors and makes new ones without the framework's headers.
#pragma once

#include <cstdint>

namespace icsd::dlpack {

constexpr std::uint32_t kMajorVersion = 1;  // DLPACK_MAJOR_VERSION

struct DLPackVersion {
  std::uint32_t major, minor;
};

enum DLDeviceType : std::int32_t { kDLCPU = 1, kDLCUDA = 2 };

struct DLDevice {
  DLDeviceType device_type;
  std::int32_t device_id;
};

enum DLDataTypeCode : std::uint8_t { kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4 };

struct DLDataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t *shape, *strides;  // strides in elements
  std::uint64_t byte_offset;
};

struct DLManagedTensorVersioned {
  DLPackVersion version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned* self);
  std::uint64_t flags;
  DLTensor dl_tensor;
};

struct DLPackExchangeAPIHeader {
  DLPackVersion version;
  const DLPackExchangeAPIHeader* prev_api;
};

// Functions return 0 or, after an error, another number. Then Python's error is set; the allocator calls SetError
// instead.
struct DLPackExchangeAPI {
  DLPackExchangeAPIHeader header;
  int (*managed_tensor_allocator)(DLTensor* prototype, DLManagedTensorVersioned** out, void* error_ctx,
                                  void (*SetError)(void* error_ctx, const char* kind, const char* message));
  int (*managed_tensor_from_py_object_no_sync)(void* py_object, DLManagedTensorVersioned** out);
  int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned* tensor, void** out_py_object);
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);  // may be null
  int (*current_work_stream)(DLDeviceType device_type, std::int32_t device_id, void** out_current_stream);
};

constexpr const char* kExchangeAttribute = "__dlpack_c_exchange_api__";  // of a tensor's Python type: a capsule
constexpr const char* kExchangeCapsule = "dlpack_exchange_api";          // the name of the capsule

}  // namespace icsd::dlpack
