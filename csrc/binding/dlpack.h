// What is used here of DLPack's C exchange interface (version 1, https://dmlc.github.io/dlpack): the binary interface by
// which frameworks hand tensors to native code and take them from it, without a step of Python and without their headers.
#pragma once

#include <cstdint>

namespace icsd::dlpack {

constexpr const char* kAttribute = "__dlpack_c_exchange_api__";  // of a tensor's type
constexpr const char* kCapsule = "dlpack_exchange_api";          // that stands there, of an Exchange
constexpr std::uint32_t kMajor = 1;

struct Version {
  std::uint32_t major, minor;
};

struct Device {
  std::int32_t kind, index;
};
constexpr std::int32_t kCpu = 1;

struct ElementType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
constexpr std::uint8_t kFloat = 2, kBfloat = 4;

struct Tensor {
  void* data;
  Device device;
  std::int32_t dimensions;
  ElementType type;
  std::int64_t *sizes, *strides;  // in elements
  std::uint64_t byte_offset;
};

// With what frees it.
struct ManagedTensor {
  Version version;
  void* context;
  void (*free)(ManagedTensor*);
  std::uint64_t flags;
  Tensor tensor;
};

// A framework's functions, on its Python objects; those that return a number set Python's error and return another than 0.
struct Exchange {
  Version version;
  const Exchange* previous;
  void *make, *lend;                                  // not used here
  int (*take)(ManagedTensor* tensor, void** object);  // a new object, which owns the tensor
  int (*view)(void* object, Tensor* tensor);          // of what stays the object's
  void* stream;                                       // not used here
};

}  // namespace icsd::dlpack
