// A 16-byte load from a pointer that is aligned to 4.
#include "planted.h"

namespace misaligned_vector {

template <bool planted>
__global__ void copy(const float* x, float* out) {
  const float* from = x + 4 * threadIdx.x + 1;
  const float4 value =
      planted ? *reinterpret_cast<const float4*>(from) : make_float4(from[0], from[1], from[2], from[3]);
  *reinterpret_cast<float4*>(out + 4 * threadIdx.x) = value;
}

template <bool planted>
bool run() {
  Memory<float> x(129), out(128);
  launch(copy<planted>, 1, 32, 0, nullptr, x, out);
  return out.sum() == x.sum();
}

}  // namespace misaligned_vector

PLANT(misaligned_vector)
