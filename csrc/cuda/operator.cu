#include "cuda/operator.h"

#include "cuda/runtime/launch.cuh"
#include "cuda/kernels/launchers.h"

namespace icsd::cuda {
namespace {

// The arrays of the epilogue in a workspace, one after the other.
template <class C>
struct Arrays {
  std::size_t inverse_norms, values, statistics, slots, bytes;

  Arrays(std::size_t begin, std::size_t stages, Shape shape, LossKind loss_kind, bool save) : bytes(begin) {
    const std::size_t rows = shape.groups * shape.samples;
    inverse_norms = take(stages * rows);
    values = take((stages - 1) * rows);
    statistics = take((stages - 1) * rows * statistics_of(loss_kind));
    slots = take(save ? 0 : stages * rows * (shape.samples + 1));
  }

 private:
  std::size_t take(std::size_t elements) {
    const std::size_t begin = bytes;
    bytes += (elements * sizeof(C) + 255) / 256 * 256;
    return begin;
  }
};

}  // namespace

template <class C>
void gram(const Features& x, Shape shape, C* out, const Context& context) {
  if (shape.groups * shape.samples == 0) return;
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const GramPlans plans = plan_grams({x}, shape);
  char* const workspace = static_cast<char*>(context.allocate(plans.bytes));
  launch_grams({x}, shape, plans, workspace, stream);
  launch_sum_gram<C>(partials_of({x}, plans, workspace)[0], shape, out, stream);
}

template <class C>
void combine(const C* matrix, std::int64_t outputs, const Features& x, const Features& out, Shape shape,
             const Context& context) {
  launch_combine({{matrix, outputs * shape.samples, nullptr, 0, x, out}}, shape, outputs, shape.samples, 0, sizeof(C) == 8, nullptr,
               static_cast<cudaStream_t>(context.stream));
}

template <class C>
void distill_sample(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, C* slots,
                    const Context& context) {
  if (shape.groups == 0) return;
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const GramPlans plans = plan_grams(stages, shape);
  const Arrays<C> arrays(plans.bytes, stages.size(), shape, spec.loss, slots);
  char* const workspace = static_cast<char*>(context.allocate(arrays.bytes));
  const auto at = [&](std::size_t offset) { return reinterpret_cast<C*>(workspace + offset); };

  if (shape.samples) launch_grams(stages, shape, plans, workspace, stream);
  RowsArguments<C> arguments{};
  const std::vector<Partials> partials = partials_of(stages, plans, workspace);
  for (std::size_t k = 0; k < stages.size(); ++k) {
    arguments.partials[k] = partials[k];
    if (k + 1 < stages.size()) arguments.weights[k] = static_cast<C>(spec.weights[k]);
  }
  arguments.students = static_cast<int>(stages.size()) - 1;
  arguments.samples = static_cast<int>(shape.samples);
  arguments.groups = shape.groups;
  arguments.saved = slots ? slots : at(arrays.slots);
  arguments.inverse_norms = at(arrays.inverse_norms);
  arguments.values = at(arrays.values);
  arguments.statistics = at(arrays.statistics);
  arguments.loss = loss;
  arguments.eps = static_cast<C>(spec.eps);
  arguments.teacher_gradient = spec.teacher_gradient;
  launch_rows<C>(arguments, spec.loss, {spec.parameters.data(), static_cast<C>(shape.samples), static_cast<C>(spec.eps)},
                     slots, stream);
}

template <class C>
void distill_sample_backward(const C* grad, const C* slots, const std::vector<Features>& stages,
                             const std::vector<Features>& outs, Shape shape, const Context& context) {
  const std::int64_t n = shape.samples, slot = n * (n + 1);
  std::vector<Product> products;
  for (std::size_t k = 0; k < outs.size(); ++k) {
    const C* matrix = slots + static_cast<std::int64_t>(k) * shape.groups * slot;
    if (outs[k].data) products.push_back({matrix, slot, matrix + n, slot, stages[k], outs[k]});
  }
  launch_combine(products, shape, n, n + 1, n + 1, sizeof(C) == 8, grad, static_cast<cudaStream_t>(context.stream));
}

namespace {

// Whether this process uses the device already: making it the current one would otherwise create a context there, which
// takes hundreds of megabytes of its memory.
bool has_context(int device) {
  using GetState = int (*)(int device, unsigned* flags, int* active);  // the driver's cuDevicePrimaryCtxGetState
  static const GetState get_state = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &function, 7000, cudaEnableDefault, &found));
    return reinterpret_cast<GetState>(function);
  }();
  unsigned flags = 0;
  int active = 0;
  return !get_state || get_state(device, &flags, &active) || active;
}

}  // namespace

DeviceGuard::DeviceGuard(int device) : device_(device) {
  check(cudaGetDevice(&previous_));
  if (device_ != previous_) check(cudaSetDevice(device_));
}

DeviceGuard::~DeviceGuard() {
  if (device_ != previous_ && has_context(previous_)) cudaSetDevice(previous_);
}

std::uint64_t launches() { return launched; }

Devices devices() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) return {count, ""};
  cudaGetLastError();  // clears it
  return {0, cudaGetErrorString(status)};
}

#define ICSD_INSTANTIATE(C)                                                                                               \
  template void gram<C>(const Features&, Shape, C*, const Context&);                                                      \
  template void combine<C>(const C*, std::int64_t, const Features&, const Features&, Shape, const Context&);              \
  template void distill_sample<C>(const std::vector<Features>&, Shape, const Spec&, C*, C*, const Context&);              \
  template void distill_sample_backward<C>(const C*, const C*, const std::vector<Features>&, const std::vector<Features>&, \
                                           Shape, const Context&);
ICSD_INSTANTIATE(float)
ICSD_INSTANTIATE(double)
#undef ICSD_INSTANTIATE

}  // namespace icsd::cuda
