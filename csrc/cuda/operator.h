// The operator on CUDA devices, as cpu/sample.h has it on the CPU. Functions enqueue kernels on a stream of the
// current device and return without waiting for them. Nothing here needs CUDA's headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/covariance.h"
#include "core/features.h"
#include "core/spec.h"

namespace icsd::cuda {

constexpr int kMaxStages = 32;  // of one call

// The stream and the memory of a call, from the framework of its tensors.
struct Context {
  void* stream;  // a cudaStream_t of the current device
  // Returns memory for the kernels of this call. It must not be used after them: it may be given to the next call then.
  std::function<void*(std::size_t bytes)> allocate;
};

template <class C>
void gram(const Features& x, Shape shape, C* out, const Context& context);

template <class C>
void combine(const C* matrix, std::int64_t outputs, const Features& x, const Features& out, Shape shape,
             const Context& context);

// Returns the distance of the rows of a saved matrix [A | r], so that each begins at a multiple of four elements.
inline std::int64_t saved_pitch(std::int64_t samples) { return (samples / 4 + 1) * 4; }

// `saved` is that of cpu/sample.h with this pitch, (stages, groups, samples, pitch), or null.
template <class C>
void distill_sample(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, C* saved,
                    const Context& context);
template <class C>
void distill_sample_backward(const C* grad, const C* saved, const std::vector<Features>& stages,
                             const std::vector<Features>& outs, Shape shape, const Context& context);

constexpr int kSquareSplits = 64;  // partial sums of the squares of a matrix's elements

// Returns the elements that `mse` in feature space saves for each group: the matrices of core/covariance.h, the sums of
// their squares and the inverse norms of all stages' samples. Each of the three is one array for all groups.
inline std::int64_t feature_elements(const std::vector<Features>& stages, std::int64_t samples) {
  const auto count = static_cast<std::int64_t>(stages.size());
  return covariance_elements(stages) + (2 * count - 1) * kSquareSplits + count * samples;
}

// Stages are of one type; `saved` is (groups, feature_elements), or null.
template <class C>
void distill_feature(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, double* saved,
                     const Context& context);
template <class C>
void distill_feature_backward(const C* grad, const double* saved, const std::vector<Features>& stages,
                              const std::vector<Features>& outs, Shape shape, const Spec& spec, const Context& context);

// Makes row blocks of the N x N matrices, one after the other, instead of the whole, in as many launches as it takes.
// Stages are of one compute type; `saved` is that of cpu/streamed.h.
template <class C>
void distill_streamed(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, C* saved,
                      const Context& context);
template <class C>
void distill_streamed_backward(const C* grad, const C* saved, const std::vector<Features>& stages,
                               const std::vector<Features>& outs, Shape shape, const Spec& spec,
                               const Context& context);

// Bytes of all row blocks that exist at a time, unless one tile's rows are more. Tests make it smaller.
inline std::int64_t row_block_bytes = 64 << 20;

// Makes a device the current one of this thread while the guard lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int device_, previous_;
};

// Kernels launched by this process so far.
std::uint64_t launches();

// The number of devices that the CUDA runtime of this build can use. If it is 0, `error` is the reason.
struct Devices {
  int count;
  std::string error;
};
Devices devices();

}  // namespace icsd::cuda
