#include "cuda/kernels/bank.h"

#include <algorithm>

#include "cuda/kernels/bank.cuh"
#include "cuda/runtime/device.cuh"

namespace icsd::cuda {
namespace {

constexpr int kMostParameters = 3;        // of a loss
constexpr std::int64_t kFewestTiles = 4;  // of a split: fewer would be little work beside what a block writes

bool uses_tensor_cores(DType dtype) { return dtype != DType::float64 && has_tensor_cores(); }

std::int64_t tile_columns(DType dtype) {
  if (uses_tensor_cores(dtype)) return BankLayout<float, true>::kColumns;
  return dtype == DType::float64 ? BankLayout<double, false>::kColumns : BankLayout<float, false>::kColumns;
}

// Returns a loss that is a mean over rows, or over all elements, of the similarities of queries to banks.
template <class C>
BankLoss<C> bank_loss(const BankCall& call) {
  const double rows = static_cast<double>(call.queries.samples), elements = rows * call.banks.samples;
  // Only the parameters of the loss itself are read; those of the others are never used.
  double parameters[kMostParameters] = {1, 1, 1};
  std::copy(call.spec.parameters.begin(), call.spec.parameters.end(), parameters);
  const LossArguments<C> arguments{parameters, static_cast<C>(rows), static_cast<C>(call.spec.eps)};
  const bool is_kl = call.spec.loss == LossKind::kl;
  BankLoss<C> loss{call.spec.loss, static_cast<C>(is_kl ? 1 / rows : 1 / elements), Kl<C>(arguments), Mse<C>(arguments),
                   SmoothL1<C>(arguments)};
  loss.mse.scale = loss.smooth_l1.scale = loss.scale;
  return loss;
}

template <class T>
BankSamples<T> bank_samples(const Features& x, void* inverse_norms) {
  return {static_cast<const T*>(x.data),
          x.dim,
          x.group_stride,
          x.sample_stride,
          static_cast<Compute<T>*>(inverse_norms),
          copy_bytes(x.data, x.group_stride, x.sample_stride, sizeof(T))};
}

template <class T>
BankArguments<T> bank_arguments(const BankCall& call, const BankPass& pass) {
  const BankSide &own = pass.of_bank ? call.banks : call.queries, &other = pass.of_bank ? call.queries : call.banks;
  const auto samples = [](const BankSide& side, int k) {
    return bank_samples<T>(side.features[k], side.inverse_norms[k]);
  };
  return {{samples(own, 0), samples(own, 1)},
          {samples(other, 0), samples(other, 1)},
          static_cast<int>(own.samples),
          static_cast<int>(other.samples),
          static_cast<int>(divide_up(own.samples, kBankRows)),
          static_cast<int>(pass.plan.splits),
          static_cast<int>(pass.plan.split_samples),
          0,  // buffers: launch_bank sets them
          call.groups,
          pass.of_bank,
          pass.stage,
          static_cast<const Compute<T>*>(call.statistics),
          static_cast<Compute<T>*>(pass.partials),
          pass.pitch,
          pass.rows,
          bank_loss<Compute<T>>(call)};
}

// Launches a kernel with as many buffers of samples as a block has memory for.
template <class Layout, class T>
void launch_bank(void (*kernel)(BankArguments<T>), BankArguments<T> arguments, cudaStream_t stream) {
  arguments.buffers = Layout::kMaxBuffers;
  const std::size_t limit = dynamic_shared_limit(kernel);
  while (arguments.buffers > 2 && Layout::bytes(arguments.buffers) > limit) --arguments.buffers;
  allow_shared(kernel, Layout::bytes(arguments.buffers));
  const std::int64_t grid = arguments.groups * arguments.splits * arguments.row_tiles;
  launch(kernel, blocks(grid), kBankThreads, Layout::bytes(arguments.buffers), stream, arguments);
}

}  // namespace

BankPlan plan_bank(DType dtype, std::int64_t groups, std::int64_t own, std::int64_t other, std::int64_t most) {
  const std::int64_t columns = tile_columns(dtype), tiles = divide_up(other, columns);
  const std::int64_t filling = 2 * multiprocessors() / (groups * divide_up(own, kBankRows));
  const std::int64_t splits = std::max<std::int64_t>(1, std::min({filling, tiles / kFewestTiles, most}));
  const std::int64_t split_samples = divide_up(tiles, splits) * columns;
  return {divide_up(other, split_samples), split_samples};
}

std::int64_t bank_pitch(std::int64_t dim) { return divide_up(dim, kPadding) * kPadding; }

void launch_bank_norms(const BankCall& call, cudaStream_t stream) {
  with_element(call.dtype(), [&](auto element) {
    using T = decltype(element);
    BankNormArguments<T> arguments{};
    arguments.eps = static_cast<Compute<T>>(call.spec.eps);
    std::int64_t last = 0;
    for (const BankSide* side : {&call.queries, &call.banks}) {
      for (int k = 0; k < 2; ++k) {
        if (k == 1 && side->inverse_norms[1] == side->inverse_norms[0]) continue;  // the same samples
        last += call.groups * side->samples;
        arguments.of[arguments.count] = bank_samples<T>(side->features[k], side->inverse_norms[k]);
        arguments.samples[arguments.count] = static_cast<int>(side->samples);
        arguments.last[arguments.count++] = last;
      }
    }
    launch(bank_norms<T>, blocks(divide_up(last, kBankThreads / 32)), kBankThreads, 0, stream, arguments);
  });
}

void launch_bank_pass(const BankCall& call, const BankPass& pass, cudaStream_t stream) {
  with_element(call.dtype(), [&](auto element) {
    using T = decltype(element);
    const auto arguments = bank_arguments<T>(call, pass);
    if constexpr (!std::is_same_v<T, double>) {
      if (uses_tensor_cores(call.dtype())) return launch_bank<BankLayout<T, true>>(bank_tensor<T>, arguments, stream);
    }
    launch_bank<BankLayout<T, false>>(bank_fma<T>, arguments, stream);
  });
}

template <class C>
void launch_bank_rows(const BankCall& call, const void* rows, std::int64_t splits, C* value, cudaStream_t stream) {
  launch(finish_bank_rows<C>, blocks(call.groups), kBackwardThreads, 0, stream, rows,
         static_cast<int>(call.queries.samples), static_cast<int>(splits), call.groups,
         static_cast<C*>(call.statistics), value, bank_loss<C>(call));
}

template void launch_bank_rows<float>(const BankCall&, const void*, std::int64_t, float*, cudaStream_t);
template void launch_bank_rows<double>(const BankCall&, const void*, std::int64_t, double*, cudaStream_t);

void launch_bank_gradients(const BankCall& call, const BankPass& pass, const Features& out, cudaStream_t stream) {
  const BankSide& own = pass.of_bank ? call.banks : call.queries;
  with_element(call.dtype(), [&](auto element) {
    using T = decltype(element);
    const BankGradientArguments<T> arguments{bank_samples<T>(own.features[pass.stage], own.inverse_norms[pass.stage]),
                                             static_cast<int>(own.samples),
                                             static_cast<int>(pass.plan.splits),
                                             call.groups,
                                             pass.pitch,
                                             static_cast<Compute<T>*>(pass.partials),
                                             static_cast<T*>(out.data),
                                             out.group_stride,
                                             out.sample_stride,
                                             static_cast<Compute<T>>(call.spec.eps)};
    const unsigned grid = blocks(divide_up(call.groups * own.samples, kBankThreads / 32));
    launch(finish_bank_gradients<T>, grid, kBankThreads, 0, stream, arguments);
  });
}

}  // namespace icsd::cuda
