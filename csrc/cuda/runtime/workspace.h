// The arrays of a call in one allocation.
#pragma once

#include <cstddef>
#include <cstdint>

namespace icsd::cuda {

// The place of an array in a workspace.
template <class T>
struct Array {
  std::size_t offset = 0;

  T* in(void* workspace) const { return reinterpret_cast<T*>(static_cast<char*>(workspace) + offset); }
};

// Places arrays one after the other, each at a multiple of 256 bytes.
class WorkspaceLayout {
 public:
  template <class T>
  Array<T> add(std::int64_t elements) {
    const Array<T> array{bytes_};
    bytes_ += (elements * sizeof(T) + 255) / 256 * 256;
    return array;
  }
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_ = 0;
};

}  // namespace icsd::cuda
