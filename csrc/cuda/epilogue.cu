#include "cuda/epilogue.cuh"

#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/launchers.h"

namespace icsd::cuda {
namespace {

// Rows of a block that sums: few enough that all multiprocessors have some.
int band_for(Shape shape) {
  return static_cast<int>(std::clamp<std::int64_t>(shape.groups * shape.samples / multiprocessors(), 1, kMaxBand));
}

unsigned bands_of(Shape shape, int band) { return blocks(shape.groups * ((shape.samples + band - 1) / band)); }

}  // namespace

template <class C>
void launch_sum_gram(const Partials& partials, Shape shape, C* out, cudaStream_t stream) {
  const int band = band_for(shape);
  launch(sum_gram<C>, bands_of(shape, band), kMeasureThreads, 0, stream, partials, static_cast<int>(shape.samples), band,
         out);
}

template <class C>
void launch_epilogue(EpilogueArguments<C> arguments, LossKind kind, const LossArguments<C>& of, bool save,
                     cudaStream_t stream) {
  const Shape shape{arguments.groups, arguments.samples};
  arguments.band = band_for(shape);
  with_loss(kind, [&](auto tag) {
    using D = typename decltype(tag)::template Of<C>;
    const D loss(of);
    const std::size_t row = arguments.samples * sizeof(C);
    if (arguments.samples) {
      allow_shared(measure<C, D>, 2 * row);
      launch(measure<C, D>, bands_of(shape, arguments.band), kMeasureThreads, 2 * row, stream, arguments, loss);
    }
    const std::size_t shared = arguments.teacher_gradient ? row : 0;
    allow_shared(differentiate<C, D>, shared);
    launch(differentiate<C, D>, blocks(shape.groups * (save ? 1 + shape.samples : 1)), kDifferentiateThreads, shared,
           stream, arguments, loss);
  });
}

int statistics_of(LossKind kind) {
  return with_loss(kind, [](auto tag) { return decltype(tag)::template Of<float>::kStatistics; });
}

#define ICSD_INSTANTIATE(C)                                                                                     \
  template void launch_sum_gram<C>(const Partials&, Shape, C*, cudaStream_t);                                   \
  template void launch_epilogue<C>(EpilogueArguments<C>, LossKind, const LossArguments<C>&, bool, cudaStream_t);
ICSD_INSTANTIATE(float)
ICSD_INSTANTIATE(double)
#undef ICSD_INSTANTIATE

}  // namespace icsd::cuda
