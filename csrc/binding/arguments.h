// Checks of the arguments of native functions, and their conversion to what the kernels take.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "binding/tensor.h"
#include "core/covariance.h"
#include "core/features.h"
#include "core/spec.h"
#include "cpu/streamed.h"

namespace icsd {

using std::int64_t;

[[noreturn]] inline void refuse(const std::string& reason) { throw std::invalid_argument("icsd._native: " + reason); }

// Returns a * b * c, of sizes, which are not negative.
inline int64_t product(int64_t a, int64_t b, int64_t c) {
  int64_t ab = 0, abc = 0;
  if (__builtin_mul_overflow(a, b, &ab) || __builtin_mul_overflow(ab, c, &abc)) refuse("sizes overflow 64 bits");
  return abc;
}

inline DType dtype_of(const Tensor& x, const char* name) {
  const auto is = [&](std::uint8_t code, int bits) { return x.dtype.code == code && x.dtype.bits == bits; };
  if (x.dtype.lanes == 1) {
    if (is(dlpack::kDLFloat, 32)) return DType::float32;
    if (is(dlpack::kDLFloat, 64)) return DType::float64;
    if (is(dlpack::kDLBfloat, 16)) return DType::bfloat16;
    if (is(dlpack::kDLFloat, 16)) return DType::float16;
  }
  refuse(std::string(name) + " must be float32, float64, bfloat16 or float16");
}

template <class C>
constexpr DType kDType = std::is_same_v<C, double> ? DType::float64 : DType::float32;

// Calls call(double{}) or call(float{}).
template <class Call>
auto with_compute_type(bool is_double, const Call& call) {
  return is_double ? call(double{}) : call(float{});
}

template <class T>
T* data_of(const Tensor& x, std::size_t alignment, const char* name) {
  const auto address = reinterpret_cast<std::uintptr_t>(x.data) + x.byte_offset;
  if (address % alignment) refuse(std::string(name) + " is not aligned to its element");
  return reinterpret_cast<T*>(address);
}

// Returns all sizes of a tensor but the last two, then these.
inline std::vector<int64_t> sizes_like(const Tensor& x, std::initializer_list<int64_t> last) {
  std::vector<int64_t> sizes(x.shape, x.shape + x.ndim - 2);
  sizes.insert(sizes.end(), last);
  return sizes;
}

// Features and the shape of their batch.
struct Batch {
  Features features;
  Shape shape;
};

// Takes a tensor (*B, N, D) in which the features of a sample are adjacent and the groups are one stride apart.
inline Batch batch_of(const Tensor& x, const char* name) {
  const std::string what(name);
  const DType dtype = dtype_of(x, name);
  const int last = x.ndim - 1;
  if (last < 1) refuse(what + " must have the shape (*B, N, D)");
  int64_t groups = 1, group_stride = 0, next = 0;
  bool first = true;
  for (int dim = last - 2; dim >= 0; --dim) groups = product(groups, x.shape[dim], 1);
  const Shape shape{groups, x.shape[last - 1]};
  const int64_t features = x.shape[last];
  product(groups, shape.samples, shape.samples + 1);  // the elements that are saved for a stage
  void* const data = data_of<void>(x, size_of(dtype), name);
  if (product(groups, shape.samples, features) == 0) return {{data, dtype, features, 0, 0}, shape};
  if (!data) refuse(what + " has no memory");
  for (int dim = 0; dim <= last; ++dim) {
    if (x.strides[dim] < 0) refuse(what + " has a negative stride");
  }
  if (features > 1 && x.strides[last] != 1) refuse(what + " has samples whose features are not adjacent");
  for (int dim = last - 2; dim >= 0; --dim) {
    if (x.shape[dim] == 1) continue;
    if (first) {
      group_stride = x.strides[dim];
    } else if (x.strides[dim] != next) {
      refuse(what + " has groups that are not one stride apart");
    }
    first = false;
    next = x.strides[dim] * x.shape[dim];
  }
  return {{data, dtype, features, group_stride, x.strides[last - 1]}, shape};
}

// Returns the rows of a matrix (*B, M, N) for `combine`.
inline int64_t outputs_of(const Tensor& matrix, const Batch& x) {
  if (matrix.ndim < 2) refuse("matrix must have the shape (*B, M, N)");
  if (matrix.shape[matrix.ndim - 1] != x.shape.samples) refuse("matrix and x do not fit");
  return matrix.shape[matrix.ndim - 2];
}

// Returns the elements of a contiguous tensor of type C, which must be `count`.
template <class C>
C* elements_of(const Tensor& x, int64_t count, const char* name) {
  if (dtype_of(x, name) != kDType<C>) refuse(std::string(name) + " is not of the compute type");
  int64_t elements = 1;
  for (int dim = x.ndim; dim-- > 0;) {
    if (x.shape[dim] > 1 && x.strides[dim] != elements && count > 0) refuse(std::string(name) + " is not contiguous");
    elements = product(elements, x.shape[dim], 1);
  }
  if (elements != count) {
    refuse(std::string(name) + " must have " + std::to_string(count) + " elements, got " + std::to_string(elements));
  }
  return data_of<C>(x, sizeof(C), name);
}

// The features of all stages, of the same samples.
struct Inputs {
  std::vector<Features> features;
  Shape shape;

  bool is_double() const {
    return std::any_of(features.begin(), features.end(), [](const Features& x) { return x.dtype == DType::float64; });
  }
};

inline Inputs inputs_of(const std::vector<Tensor>& tensors) {
  if (tensors.empty()) refuse("inputs must not be empty");
  Inputs inputs{{}, batch_of(tensors[0], "input").shape};
  for (const Tensor& tensor : tensors) {
    const Batch batch = batch_of(tensor, "input");
    if (batch.shape.groups != inputs.shape.groups || batch.shape.samples != inputs.shape.samples) {
      refuse("inputs must agree in all but the last dimension");
    }
    inputs.features.push_back(batch.features);
  }
  return inputs;
}

// Checks that there is an input for each weight and, if it is to be there, one for the teacher.
inline void check_count(const Inputs& inputs, const Spec& spec, bool teacher) {
  if (inputs.features.size() == spec.weights.size() + teacher) return;
  refuse("inputs must be one for each of " + std::to_string(spec.weights.size()) + " weights" +
         (teacher ? " and the teacher" : "") + ", got " + std::to_string(inputs.features.size()));
}

inline LossKind loss_kind_of(const std::string& name) {
  std::string known;
  for (const LossKind kind : kAllLosses) {
    if (name == name_of(kind)) return kind;
    known += std::string(known.empty() ? "" : ", ") + name_of(kind);
  }
  refuse("loss must be one of " + known + ", got " + name);
}

inline int parameters_of(LossKind kind) {
  return with_loss(kind, [](auto tag) { return decltype(tag)::template Of<double>::kParameters; });
}

inline Regime regime_of(const std::string& name) {
  if (name == "sample") return Regime::sample;
  if (name == "feature") return Regime::feature;
  if (name == "streamed") return Regime::streamed;
  refuse("regime must be sample, feature or streamed, got " + name);
}

inline Spec spec_of(const std::string& loss, std::vector<double> parameters, std::vector<double> weights, double eps,
                    bool teacher_gradient, const std::string& regime, bool center) {
  const LossKind kind = loss_kind_of(loss);
  if (parameters.size() != static_cast<std::size_t>(parameters_of(kind))) {
    refuse(loss + " takes " + std::to_string(parameters_of(kind)) + " parameters, got " +
           std::to_string(parameters.size()));
  }
  const Spec spec{kind, std::move(parameters), std::move(weights), eps, teacher_gradient, regime_of(regime), center};
  if (spec.regime == Regime::feature && kind != LossKind::mse) refuse("the regime feature is for mse, got " + loss);
  if (spec.regime == Regime::feature && spec.parameters.back() == 0) refuse("the regime feature includes the diagonal");
  if (spec.regime == Regime::feature && spec.parameters.front() != 0) refuse("the regime feature clamps nothing");
  if (center && spec.regime != Regime::sample) refuse("the regime sample can center, got " + regime);
  return spec;
}

// Returns the sizes of what the forward pass of a backend saves: for sample space a matrix for each stage and group,
// for the other regimes one array for each group.
template <class Backend>
std::vector<int64_t> saved_sizes(const Tensor& like, const Inputs& inputs, Regime regime, int64_t stages) {
  const auto [groups, n] = inputs.shape;
  if (regime == Regime::sample) {
    const int64_t pitch = Backend::saved_pitch(n);
    product(product(stages, groups, 1), n, pitch);
    std::vector<int64_t> sizes = sizes_like(like, {n, pitch});
    sizes.insert(sizes.begin(), stages);
    return sizes;
  }
  int64_t numbers = 0;
  if (regime == Regime::streamed) {
    product(n, stages, kMaxStatistics + 1);
    numbers = cpu::streamed_elements(stages, n);
  } else {
    int64_t widest = 0;
    for (const Features& stage : inputs.features) widest = std::max(widest, stage.dim);
    product(2 * stages, widest, widest);
    numbers = Backend::feature_elements(inputs);
  }
  product(groups, numbers, 1);
  return sizes_like(like, {numbers});
}

}  // namespace icsd
