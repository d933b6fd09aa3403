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

std::size_t gram_workspace(const Features& x, Shape shape) {
  return plan_grams({x}, shape).bytes;
}

template <class C>
void gram(const Features& x, Shape shape, C* out, void* workspace, Stream stream) {
  if (shape.groups * shape.samples == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  char* const bytes = static_cast<char*>(workspace);
  const GramPlans plans = plan_grams({x}, shape);
  launch_grams({x}, shape, plans, bytes, on);
  launch_sum_gram<C>(partials_of({x}, plans, bytes)[0], shape, out, on);
}

template <class C>
void combine(const C* matrix, std::int64_t outputs, const Features& x, const Features& out, Shape shape, Stream stream) {
  launch_combine({{matrix, outputs * shape.samples, nullptr, 0, x, out}}, shape, outputs, shape.samples, 0, sizeof(C) == 8, nullptr,
               static_cast<cudaStream_t>(stream));
}

template <class C>
std::size_t distill_workspace(const std::vector<Features>& stages, Shape shape, LossKind loss_kind, bool save) {
  return Arrays<C>(plan_grams(stages, shape).bytes, stages.size(), shape, loss_kind, save).bytes;
}

template <class C>
void distill(const std::vector<Features>& stages, Shape shape, const Distillation& how, C* loss, C* slots,
             void* workspace, Stream stream) {
  if (shape.groups == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  char* const bytes = static_cast<char*>(workspace);
  const GramPlans plans = plan_grams(stages, shape);
  const Arrays<C> arrays(plans.bytes, stages.size(), shape, how.loss, slots);
  const auto at = [&](std::size_t offset) { return reinterpret_cast<C*>(bytes + offset); };

  if (shape.samples) launch_grams(stages, shape, plans, bytes, on);
  RowsArguments<C> arguments{};
  const std::vector<Partials> partials = partials_of(stages, plans, bytes);
  for (std::size_t k = 0; k < stages.size(); ++k) {
    arguments.partials[k] = partials[k];
    if (k + 1 < stages.size()) arguments.weights[k] = static_cast<C>(how.weights[k]);
  }
  arguments.students = static_cast<int>(stages.size()) - 1;
  arguments.samples = static_cast<int>(shape.samples);
  arguments.groups = shape.groups;
  arguments.saved = slots ? slots : at(arrays.slots);
  arguments.inverse_norms = at(arrays.inverse_norms);
  arguments.values = at(arrays.values);
  arguments.statistics = at(arrays.statistics);
  arguments.loss = loss;
  arguments.eps = static_cast<C>(how.eps);
  arguments.teacher_gradient = how.teacher_gradient;
  launch_rows<C>(arguments, how.loss, {how.parameters, static_cast<C>(shape.samples), static_cast<C>(how.eps)},
                     slots, on);
}

template <class C>
void distill_backward(const C* grad, const C* slots, const std::vector<Features>& stages,
                      const std::vector<Features>& outs, Shape shape, Stream stream) {
  const std::int64_t n = shape.samples, slot = n * (n + 1);
  std::vector<Product> products;
  for (std::size_t k = 0; k < outs.size(); ++k) {
    const C* matrix = slots + static_cast<std::int64_t>(k) * shape.groups * slot;
    if (outs[k].data) products.push_back({matrix, slot, matrix + n, slot, stages[k], outs[k]});
  }
  launch_combine(products, shape, n, n + 1, n + 1, sizeof(C) == 8, grad, static_cast<cudaStream_t>(stream));
}

std::uint64_t launches() { return launched; }

Devices devices() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) return {count, ""};
  cudaGetLastError();  // clears it
  return {0, cudaGetErrorString(status)};
}

#define ICSD_INSTANTIATE(C)                                                                                         \
  template void gram<C>(const Features&, Shape, C*, void*, Stream);                                                 \
  template void combine<C>(const C*, std::int64_t, const Features&, const Features&, Shape, Stream);                \
  template std::size_t distill_workspace<C>(const std::vector<Features>&, Shape, LossKind, bool);             \
  template void distill<C>(const std::vector<Features>&, Shape, const Distillation&, C*, C*, void*, Stream);        \
  template void distill_backward<C>(const C*, const C*, const std::vector<Features>&, const std::vector<Features>&, \
                                    Shape, Stream);
ICSD_INSTANTIATE(float)
ICSD_INSTANTIATE(double)
#undef ICSD_INSTANTIATE

}  // namespace icsd::cuda
