// The last block reads what the others wrote, without a fence between their writes and their ticket.
#include "planted.h"

namespace ticket_without_fence {

template <bool planted>
__global__ void sum(const float* x, float* parts, unsigned* ticket, float* out) {
  parts[blockIdx.x] = x[blockIdx.x];
  if (!planted) __threadfence();
  if (atomicAdd(ticket, 1) < gridDim.x - 1) return;
  __threadfence();
  float total = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) total += parts[i];
  *out = total;
}

template <bool planted>
bool run() {
  Memory<float> x(8), parts(8), out(1);
  Memory<unsigned> ticket(1);
  launch(sum<planted>, 8, 1, 0, nullptr, x, parts, ticket, out);
  return out[0] == x.sum();
}

}  // namespace ticket_without_fence

PLANT(ticket_without_fence)
