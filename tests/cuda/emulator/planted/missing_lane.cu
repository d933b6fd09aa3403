// Some lanes that the mask names go to a barrier instead.
#include "planted.h"

namespace missing_lane {

template <bool planted>
__global__ void count_even(const int* x, int* out) {
  unsigned votes = 0;
  if (threadIdx.x < 16) votes = __ballot_sync(planted ? 0xffffffff : 0x0000ffff, x[threadIdx.x] % 2 == 0);
  __syncthreads();
  if (threadIdx.x == 0) *out = __popc(votes);
}

template <bool planted>
bool run() {
  Memory<int> x(32), out(1);
  launch(count_even<planted>, 1, 32, 0, nullptr, x, out);
  return out[0] == 9;
}

}  // namespace missing_lane

PLANT(missing_lane)
