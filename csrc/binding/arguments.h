// What the native functions make of their arguments, or refuse.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "binding/tensor.h"
#include "core/distillation.h"
#include "core/features.h"
#include "core/moments.h"
#include "cpu/streamed.h"

namespace icsd {

using std::int64_t;

[[noreturn]] inline void refuse(const std::string& what) { throw std::invalid_argument("icsd._native: " + what); }

// a * b * c for sizes, which are not negative.
inline int64_t product(int64_t a, int64_t b, int64_t c) {
  int64_t ab = 0, abc = 0;
  if (__builtin_mul_overflow(a, b, &ab) || __builtin_mul_overflow(ab, c, &abc)) refuse("sizes overflow 64 bits");
  return abc;
}

inline DType dtype_of(const Tensor& x, const char* name) {
  const auto is = [&](std::uint8_t code, int bits) { return x.type.code == code && x.type.bits == bits; };
  if (x.type.lanes == 1) {
    if (is(dlpack::kFloat, 32)) return DType::float32;
    if (is(dlpack::kFloat, 64)) return DType::float64;
    if (is(dlpack::kBfloat, 16)) return DType::bfloat16;
    if (is(dlpack::kFloat, 16)) return DType::float16;
  }
  refuse(std::string(name) + " is not of float32, float64, bfloat16 or float16");
}

template <class C>
constexpr DType kDType = std::is_same_v<C, double> ? DType::float64 : DType::float32;

template <class T>
T* data_of(const Tensor& x, std::size_t alignment, const char* name) {
  const auto address = reinterpret_cast<std::uintptr_t>(x.data) + x.byte_offset;
  if (address % alignment) refuse(std::string(name) + " is not aligned to its element");
  return reinterpret_cast<T*>(address);
}

inline void check_on_cpu(const Tensor& x, const char* name) {
  if (x.device.kind != dlpack::kCpu) refuse(std::string(name) + " is not in the memory of the CPU");
}

// All but the last two of a tensor's sizes, then these.
inline std::vector<int64_t> sizes_like(const Tensor& x, std::initializer_list<int64_t> last) {
  std::vector<int64_t> sizes(x.sizes, x.sizes + x.dimensions - 2);
  sizes.insert(sizes.end(), last);
  return sizes;
}

// Features of samples, and how many.
struct Batch {
  Features features;
  Shape shape;
};

// A tensor (*B, N, D) whose features are adjacent, and whose groups are one stride apart.
inline Batch batch_of(const Tensor& x, const char* name) {
  const std::string what(name);
  const DType dtype = dtype_of(x, name);
  const int last = x.dimensions - 1;
  if (last < 1) refuse(what + " must have the shape (*B, N, D)");
  int64_t groups = 1, group_stride = 0, next = 0;
  for (int dim = last - 2; dim >= 0; --dim) groups = product(groups, x.sizes[dim], 1);
  const Shape shape{groups, x.sizes[last - 1]};
  const int64_t features = x.sizes[last];
  product(groups, shape.samples, shape.samples + 1);  // the elements of a slot
  void* const data = data_of<void>(x, size_of(dtype), name);
  if (product(groups, shape.samples, features) == 0) return {{data, dtype, features, 0, 0}, shape};
  if (!data) refuse(what + " has no memory");
  for (int dim = 0; dim <= last; ++dim) {
    if (x.strides[dim] < 0) refuse(what + " has a negative stride");
  }
  if (features > 1 && x.strides[last] != 1) refuse(what + " has samples whose features are not adjacent");
  for (int dim = last - 2; dim >= 0; --dim) {
    if (x.sizes[dim] == 1) continue;
    if (group_stride || next) {
      if (x.strides[dim] != next) refuse(what + " has groups that are not one stride apart");
    } else {
      group_stride = x.strides[dim];
    }
    next = x.strides[dim] * x.sizes[dim];
  }
  return {{data, dtype, features, group_stride, x.strides[last - 1]}, shape};
}

// The elements of a contiguous tensor of type C, of which there must be so many.
template <class C>
C* elements_of(const Tensor& x, int64_t count, const char* name) {
  if (dtype_of(x, name) != kDType<C>) refuse(std::string(name) + " is not of the compute type");
  int64_t elements = 1;
  for (int dim = x.dimensions; dim-- > 0;) {
    if (x.sizes[dim] > 1 && x.strides[dim] != elements && count > 0) refuse(std::string(name) + " is not contiguous");
    elements = product(elements, x.sizes[dim], 1);
  }
  if (elements != count) {
    refuse(std::string(name) + " must have " + std::to_string(count) + " elements, got " + std::to_string(elements));
  }
  return data_of<C>(x, sizeof(C), name);
}

// Stages of the same samples.
struct Stages {
  std::vector<Features> features;
  Shape shape;

  bool wide() const {
    return std::any_of(features.begin(), features.end(), [](const Features& x) { return x.dtype == DType::float64; });
  }
};

inline Stages stages_of(const std::vector<Tensor>& tensors) {
  if (tensors.empty()) refuse("there is no stage");
  Stages stages{{}, batch_of(tensors[0], "stage").shape};
  for (const Tensor& tensor : tensors) {
    const Batch batch = batch_of(tensor, "stage");
    if (batch.shape.groups != stages.shape.groups || batch.shape.samples != stages.shape.samples) {
      refuse("stages must agree in all but the last dimension");
    }
    stages.features.push_back(batch.features);
  }
  return stages;
}

inline LossKind loss_kind_of(int code, const std::vector<double>& parameters) {
  if (code < 0 || code >= kLosses) refuse("unknown loss_kind code " + std::to_string(code));
  const auto kind = static_cast<LossKind>(code);
  const std::size_t count =
      with_loss(kind, [](auto tag) { return decltype(tag)::template Of<double>::kParameters; });
  if (parameters.size() != count) {
    refuse("loss_kind " + std::to_string(code) + " takes " + std::to_string(count) + " parameters, got " +
           std::to_string(parameters.size()));
  }
  return kind;
}

enum class Regime { sample, feature, streamed };

inline Regime regime_of(const std::string& name, LossKind loss_kind) {
  if (name == "sample") return Regime::sample;
  if (name == "streamed") return Regime::streamed;
  if (name != "feature") refuse("unknown regime " + name);
  if (loss_kind != LossKind::mse) refuse("feature space knows only mse");
  return Regime::feature;
}

// Stages are the students of the weights and, mostly, the teacher.
inline void check_count(const Stages& stages, const std::vector<double>& weights, bool teacher) {
  if (stages.features.size() == weights.size() + teacher) return;
  refuse("stages must be one for each of " + std::to_string(weights.size()) + " weights" +
         (teacher ? " and the teacher" : "") + ", got " + std::to_string(stages.features.size()));
}

// What is asked for; the arrays stay those of the caller.
inline Distillation distillation_of(const std::vector<double>& weights, int loss_kind,
                                    const std::vector<double>& parameters, double eps, bool teacher_gradient) {
  return {loss_kind_of(loss_kind, parameters), parameters.data(), weights.data(), eps, teacher_gradient};
}

// Numbers that streaming or feature space saves of a group.
inline int64_t saved_numbers(Regime regime, const Stages& stages) {
  const auto count = static_cast<int64_t>(stages.features.size());
  if (regime == Regime::streamed) {
    product(stages.shape.samples, count, kMaxStatistics + 1);
    return cpu::streamed_numbers(count, stages.shape.samples);
  }
  int64_t widest = 0;
  for (const Features& stage : stages.features) widest = std::max(widest, stage.features);
  product(2 * count, widest, widest);
  return feature_moments(stages.features);
}

// Of all groups; sample space's slots are those of students and teacher.
inline int64_t saved_elements(Regime regime, const Stages& stages, int64_t students) {
  const auto [groups, n] = stages.shape;
  return regime == Regime::sample ? product(students + 1, groups, n * (n + 1))
                                  : product(groups, saved_numbers(regime, stages), 1);
}

// call(double{}) or call(float{}).
template <class Call>
auto with_compute_type(bool wide, const Call& call) {
  return wide ? call(double{}) : call(float{});
}

}  // namespace icsd
