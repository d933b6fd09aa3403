// What the planted bugs share. Each `.cu` holds one in a namespace of its own: a kernel that has the bug where
// `planted` is true and is right where it is not, and run<planted>(), whether the result is right.
#pragma once

#include "cuda/runtime/launch.cuh"

using icsd::cuda::launch;

// Memory of the device, filled with 0, 1, 2 ... modulo 7.
template <class T>
class Memory {
 public:
  explicit Memory(int count) : count_(count) {
    icsd::cuda::check(cudaMalloc(&data_, count * sizeof(T)));
    for (int i = 0; i < count; ++i) data_[i] = T(i % 7);
  }
  ~Memory() { cudaFree(data_); }
  Memory(const Memory&) = delete;

  operator T*() { return data_; }
  T sum() const {
    T sum{};
    for (int i = 0; i < count_; ++i) sum += data_[i];
    return sum;
  }

 private:
  T* data_ = nullptr;
  int count_;
};

struct Bug {
  const char* name;
  bool (*planted)();
  bool (*corrected)();
  const Bug* next;
};
inline const Bug* bugs = nullptr;

#define PLANT(name)                                                            \
  const Bug planted_##name = {#name, name::run<true>, name::run<false>, bugs}; \
  const bool listed_##name = (bugs = &planted_##name);
