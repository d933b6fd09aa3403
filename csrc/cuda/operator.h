// The operator on CUDA devices, as cpu/operator.h has it on the CPU: enqueued on a stream of the current device, without
// synchronization and without memory of its own. Nothing here needs CUDA's headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/distillation.h"
#include "core/features.h"

namespace icsd::cuda {

constexpr int kMaxStages = 32;  // of one call

using Stream = void*;  // a cudaStream_t

// Slots are those of cpu/operator.h. A workspace has the bytes that its function tells for the same arguments on the same
// device, at an address that is a multiple of 256; it is free again once the stream has passed the call.

std::size_t gram_workspace(const Features& x, Shape shape);
template <class C>
void gram(const Features& x, Shape shape, C* out, void* workspace, Stream stream);

template <class C>
void combine(const C* matrix, std::int64_t outputs, const Features& x, const Features& out, Shape shape, Stream stream);

template <class C>
std::size_t distill_workspace(const std::vector<Features>& stages, Shape shape, LossKind loss_kind, bool save);
template <class C>
void distill(const std::vector<Features>& stages, Shape shape, const Distillation& how, C* loss, C* slots,
             void* workspace, Stream stream);

template <class C>
void distill_backward(const C* grad, const C* slots, const std::vector<Features>& stages,
                      const std::vector<Features>& outs, Shape shape, Stream stream);

// `mse` in feature space, stages of one type; `moments` is (groups, feature_moments) of core/moments.h, or null.
std::size_t feature_workspace(const std::vector<Features>& stages, Shape shape, bool save);
template <class C>
void distill_feature(const std::vector<Features>& stages, Shape shape, const Distillation& how, C* loss, double* moments,
                     void* workspace, Stream stream);
std::size_t feature_backward_workspace(const std::vector<Features>& stages, Shape shape);
template <class C>
void distill_feature_backward(const C* grad, const double* moments, const std::vector<Features>& stages,
                              const std::vector<Features>& outs, Shape shape, const Distillation& how, void* workspace,
                              Stream stream);

// With bands of rows of the N x N matrices instead of the whole, in as many launches as it takes: of `row_block_bytes` or, if that
// is not more, a tile's rows. Stages are of one compute type; `saved` is that of cpu/streamed.h.
template <class C>
std::size_t streamed_workspace(const std::vector<Features>& stages, Shape shape, bool teacher_gradient, bool save,
                               std::int64_t row_block_bytes);
template <class C>
void distill_streamed(const std::vector<Features>& stages, Shape shape, const Distillation& how, C* loss, C* saved,
                      std::int64_t row_block_bytes, void* workspace, Stream stream);
// The workspace is that of `save`, with the teacher's gradient if it is wanted.
template <class C>
void distill_streamed_backward(const C* grad, const C* saved, const std::vector<Features>& stages,
                               const std::vector<Features>& outs, Shape shape, const Distillation& how,
                               std::int64_t row_block_bytes, void* workspace, Stream stream);

// Kernels launched by this process so far.
std::uint64_t launches();

// The devices of the machine; 0 and the runtime's explanation where there is none to use.
struct Devices {
  int count;
  const char* error;
};
Devices devices();

}  // namespace icsd::cuda
