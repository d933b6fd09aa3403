// The sums of csrc/cuda/kernels/compensated.cuh and the norms made from them, for test_compensated.py.
#include "cuda/kernels/norms.cuh"
#include "cuda/runtime/launch.cuh"

using namespace icsd::cuda;

namespace {

// Sums the numbers of both halves apart, then these two sums.
__global__ void sum_numbers(const float* x, int n, double* out) {
  CompensatedSum<float> first, second;
  for (int i = 0; i < n / 2; ++i) first += x[i];
  for (int i = n / 2; i < n; ++i) second += x[i];
  first += second;
  *out = static_cast<double>(first);
}

template <class T>
__global__ void square(const T* x, int dim, double* out) {
  const double norm = squared_norm(x, dim);
  if (threadIdx.x == 0) *out = norm;
}

}  // namespace

extern "C" {
void sum_of(const float* x, int n, double* out) { launch(sum_numbers, 1, 32, 0, nullptr, x, n, out); }
void square_of_float(const float* x, int dim, double* out) { launch(square<float>, 1, 32, 0, nullptr, x, dim, out); }
void square_of_bfloat16(const __nv_bfloat16* x, int dim, double* out) {
  launch(square<__nv_bfloat16>, 1, 32, 0, nullptr, x, dim, out);
}
void square_of_half(const __half* x, int dim, double* out) { launch(square<__half>, 1, 32, 0, nullptr, x, dim, out); }
}
