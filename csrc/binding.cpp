// The native module: checks what Python hands over, then calls the operator without the interpreter's lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/feature.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/operator.h"
#include "cpu/streamed.h"
#ifdef ICSD_CUDA
#include "cuda/operator.h"
#endif

namespace py = pybind11;

namespace {

using icsd::Distillation;
using icsd::DType;
using icsd::Features;
using icsd::Shape;
using std::int64_t;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("icsd._native: " + what); }

// a * b * c for sizes, which are not negative.
int64_t product(int64_t a, int64_t b, int64_t c) {
  int64_t ab = 0, abc = 0;
  if (__builtin_mul_overflow(a, b, &ab) || __builtin_mul_overflow(ab, c, &abc)) refuse("sizes overflow 64 bits");
  return abc;
}

DType dtype_of(int code) {
  if (code < 0 || code >= icsd::kDTypes) refuse("unknown dtype code " + std::to_string(code));
  return static_cast<DType>(code);
}

Shape shape_of(int64_t groups, int64_t samples) {
  if (groups < 0 || samples < 0) {
    refuse("groups and samples must not be negative, got " + std::to_string(groups) + " and " + std::to_string(samples));
  }
  product(groups, samples, samples + 1);
  return {groups, samples};
}

template <class C>
C* matrix_at(std::uintptr_t address, int64_t elements, const char* name) {
  if (!address && elements > 0) refuse(std::string(name) + " is a null pointer");
  if (address % sizeof(C)) refuse(std::string(name) + " is not aligned to its element");
  return reinterpret_cast<C*>(address);
}

// (address, dtype, features, group stride, sample stride)
using FeaturesTuple = std::tuple<std::uintptr_t, int, int64_t, int64_t, int64_t>;

Features features_of(const FeaturesTuple& tuple, Shape shape, const char* name) {
  const auto& [address, code, features, group_stride, sample_stride] = tuple;
  const DType dtype = dtype_of(code);
  if (features < 0 || group_stride < 0 || sample_stride < 0) {
    refuse(std::string(name) + ": sizes and strides must not be negative");
  }
  const int64_t last_group = product(std::max<int64_t>(shape.groups - 1, 0), group_stride, 1);
  const int64_t last_sample = product(std::max<int64_t>(shape.samples - 1, 0), sample_stride, 1);
  int64_t extent = 0;
  if (__builtin_add_overflow(last_group, last_sample, &extent) ||
      __builtin_add_overflow(extent, features, &extent)) {
    refuse("sizes overflow 64 bits");
  }
  product(extent, static_cast<int64_t>(icsd::size_of(dtype)), 1);
  const bool empty = product(shape.groups, shape.samples, features) == 0;
  if (!address && !empty) refuse(std::string(name) + " is a null pointer");
  if (address % icsd::size_of(dtype)) refuse(std::string(name) + " is not aligned to its element");
  return {reinterpret_cast<void*>(address), dtype, features, group_stride, sample_stride};
}

// Memory that a call reads or writes.
struct Block {
  const char* name;
  std::uintptr_t begin, end;
};

Block block_of(const Features& x, Shape shape, const char* name) {
  const auto begin = reinterpret_cast<std::uintptr_t>(x.data);
  return {name, begin, begin + icsd::extent(x, shape) * icsd::size_of(x.dtype)};
}

template <class C>
Block block_of(const C* data, int64_t elements, const char* name) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  return {name, begin, begin + (data ? elements * sizeof(C) : 0)};
}

std::vector<Block> blocks_of(const std::vector<Features>& all, Shape shape, const char* name) {
  std::vector<Block> blocks;
  for (const Features& one : all) blocks.push_back(block_of(one, shape, name));
  return blocks;
}

// What is written must overlap neither what is read nor anything else that is written.
void check_apart(const std::vector<Block>& written, const std::vector<Block>& read) {
  const auto overlap = [](const Block& a, const Block& b) { return a.begin < b.end && b.begin < a.end; };
  for (std::size_t k = 0; k < written.size(); ++k) {
    for (const Block& other : read) {
      if (overlap(written[k], other)) refuse(std::string(written[k].name) + " overlaps its input, " + other.name);
    }
    for (std::size_t other = 0; other < k; ++other) {
      if (overlap(written[k], written[other])) {
        refuse(std::string(written[k].name) + " overlaps another result, " + written[other].name);
      }
    }
  }
}

// A result is like what it is computed from, and its samples do not overlap each other.
void check_result(const Features& out, int64_t outputs, const Features& x, Shape shape, const char* name) {
  if (out.dtype != x.dtype || out.features != x.features) refuse(std::string(name) + " does not match its input");
  const bool dense = (outputs <= 1 || out.sample_stride >= out.features) &&
                     (shape.groups <= 1 || out.group_stride >= product(outputs, out.sample_stride, 1));
  if (!dense) refuse(std::string(name) + " overlaps itself");
}

template <class Call>
void with_compute_type(bool wide, const Call& call) {
  if (wide) {
    call(double{});
  } else {
    call(float{});
  }
}

bool any_wide(const std::vector<Features>& stages) {
  for (const Features& stage : stages) {
    if (stage.dtype == DType::float64) return true;
  }
  return false;
}

void gram(const FeaturesTuple& x_tuple, int64_t groups, int64_t samples, std::uintptr_t out) {
  const Shape shape = shape_of(groups, samples);
  const Features x = features_of(x_tuple, shape, "x");
  with_compute_type(any_wide({x}), [&](auto c) {
    using C = decltype(c);
    const int64_t elements = product(groups, samples, samples);
    C* matrix = matrix_at<C>(out, elements, "out");
    check_apart({block_of(matrix, elements, "out")}, {block_of(x, shape, "x")});
    py::gil_scoped_release unlocked;
    icsd::cpu::gram<C>(x, shape, matrix);
  });
}

void combine(std::uintptr_t matrix_address, int64_t outputs, const FeaturesTuple& x_tuple, int64_t groups,
             int64_t samples, const FeaturesTuple& out_tuple) {
  const Shape shape = shape_of(groups, samples), out_shape = shape_of(groups, outputs);
  const Features x = features_of(x_tuple, shape, "x"), out = features_of(out_tuple, out_shape, "out");
  check_result(out, outputs, x, shape, "out");
  with_compute_type(any_wide({x}), [&](auto c) {
    using C = decltype(c);
    const int64_t elements = product(groups, outputs, samples);
    const C* matrix = matrix_at<C>(matrix_address, elements, "matrix");
    check_apart({block_of(out, out_shape, "out")}, {block_of(x, shape, "x"), block_of(matrix, elements, "matrix")});
    py::gil_scoped_release unlocked;
    icsd::cpu::combine<C>(matrix, outputs, x, out, shape);
  });
}

std::vector<Features> stages_of(const std::vector<FeaturesTuple>& tuples, Shape shape) {
  std::vector<Features> stages;
  for (const FeaturesTuple& tuple : tuples) stages.push_back(features_of(tuple, shape, "stage"));
  return stages;
}

icsd::DivergenceKind divergence_of(int code, const std::vector<double>& parameters) {
  if (code < 0 || code >= icsd::kDivergences) refuse("unknown divergence code " + std::to_string(code));
  const auto kind = static_cast<icsd::DivergenceKind>(code);
  const std::size_t count =
      icsd::with_divergence(kind, [](auto tag) { return decltype(tag)::template Of<double>::kParameters; });
  if (parameters.size() != count) {
    refuse("divergence " + std::to_string(code) + " takes " + std::to_string(count) + " parameters, got " +
           std::to_string(parameters.size()));
  }
  return kind;
}

Distillation distillation_of(const std::vector<Features>& stages, const std::vector<double>& weights, int divergence,
                             const std::vector<double>& parameters, double eps, bool teacher_gradient) {
  if (stages.empty()) refuse("there is no teacher");
  if (weights.size() + 1 != stages.size()) refuse("one weight for each student is needed");
  return {divergence_of(divergence, parameters), parameters.data(), weights.data(), eps, teacher_gradient};
}

void distill(const std::vector<FeaturesTuple>& tuples, int64_t groups, int64_t samples,
             const std::vector<double>& weights, int divergence, const std::vector<double>& parameters, double eps,
             bool teacher_gradient, std::uintptr_t loss_address, std::uintptr_t slots_address) {
  const Shape shape = shape_of(groups, samples);
  const std::vector<Features> stages = stages_of(tuples, shape);
  const Distillation how = distillation_of(stages, weights, divergence, parameters, eps, teacher_gradient);
  with_compute_type(any_wide(stages), [&](auto c) {
    using C = decltype(c);
    C* loss = matrix_at<C>(loss_address, groups, "loss");
    const int64_t elements = product(static_cast<int64_t>(stages.size()), groups, samples * (samples + 1));
    C* slots = slots_address ? matrix_at<C>(slots_address, elements, "slots") : nullptr;
    check_apart({block_of(loss, groups, "loss"), block_of(slots, elements, "slots")}, blocks_of(stages, shape, "stage"));
    py::gil_scoped_release unlocked;
    icsd::cpu::distill<C>(stages, shape, how, loss, slots);
  });
}

// Null data where no gradient is wanted.
std::vector<Features> results_of(const std::vector<FeaturesTuple>& tuples, const std::vector<Features>& stages,
                                 Shape shape) {
  if (tuples.size() != stages.size()) refuse("one result for each stage is needed");
  std::vector<Features> outs;
  for (std::size_t k = 0; k < stages.size(); ++k) {
    const bool wanted = std::get<0>(tuples[k]) != 0;
    outs.push_back(wanted ? features_of(tuples[k], shape, "out") : Features{});
    if (wanted) check_result(outs[k], shape.samples, stages[k], shape, "out");
  }
  check_apart(blocks_of(outs, shape, "out"), blocks_of(stages, shape, "stage"));
  return outs;
}

void distill_backward(std::uintptr_t grad_address, std::uintptr_t slots_address,
                      const std::vector<FeaturesTuple>& tuples, const std::vector<FeaturesTuple>& out_tuples, bool wide,
                      int64_t groups, int64_t samples) {
  const Shape shape = shape_of(groups, samples);
  const std::vector<Features> stages = stages_of(tuples, shape);
  const std::vector<Features> outs = results_of(out_tuples, stages, shape);
  with_compute_type(wide, [&](auto c) {
    using C = decltype(c);
    const C* grad = matrix_at<C>(grad_address, groups, "grad");
    const int64_t elements = product(static_cast<int64_t>(stages.size()), groups, samples * (samples + 1));
    const C* slots = matrix_at<C>(slots_address, elements, "slots");
    check_apart(blocks_of(outs, shape, "out"), {block_of(grad, groups, "grad"), block_of(slots, elements, "slots")});
    py::gil_scoped_release unlocked;
    icsd::cpu::distill_backward<C>(grad, slots, stages, outs, shape);
  });
}

icsd::cpu::Allocation allocate(int64_t bytes) {
  if (bytes < 0) refuse("bytes must not be negative, got " + std::to_string(bytes));
  return icsd::cpu::Allocation(static_cast<std::size_t>(bytes));
}

// The regimes of many samples; feature space saves float64 whatever the stages.
enum class Regime { feature, streamed };

// Numbers saved of a group.
template <Regime kRegime>
int64_t saved_numbers(const std::vector<Features>& stages, Shape shape) {
  if (kRegime == Regime::streamed) {
    product(shape.samples, static_cast<int64_t>(stages.size()), icsd::kMaxStatistics + 1);
    return icsd::cpu::streamed_numbers(stages.size(), shape.samples);
  }
  int64_t widest = 0;
  for (const Features& stage : stages) widest = std::max(widest, stage.features);
  product(2 * static_cast<int64_t>(stages.size()), widest, widest);
  return icsd::feature_moments(stages);
}

template <Regime kRegime, class C>
using Saved = std::conditional_t<kRegime == Regime::feature, double, C>;

template <Regime kRegime>
void distill_many(const std::vector<FeaturesTuple>& tuples, int64_t groups, int64_t samples,
                  const std::vector<double>& weights, int divergence, const std::vector<double>& parameters, double eps,
                  bool teacher_gradient, std::uintptr_t loss_address, std::uintptr_t saved_address) {
  const Shape shape = shape_of(groups, samples);
  const std::vector<Features> stages = stages_of(tuples, shape);
  const Distillation how = distillation_of(stages, weights, divergence, parameters, eps, teacher_gradient);
  if (kRegime == Regime::feature && how.divergence != icsd::DivergenceKind::mse) refuse("feature space knows only mse");
  const int64_t elements = product(groups, saved_numbers<kRegime>(stages, shape), 1);
  with_compute_type(any_wide(stages), [&](auto c) {
    using C = decltype(c);
    C* loss = matrix_at<C>(loss_address, groups, "loss");
    auto* saved = saved_address ? matrix_at<Saved<kRegime, C>>(saved_address, elements, "saved") : nullptr;
    check_apart({block_of(loss, groups, "loss"), block_of(saved, elements, "saved")}, blocks_of(stages, shape, "stage"));
    py::gil_scoped_release unlocked;
    if constexpr (kRegime == Regime::feature) {
      icsd::cpu::distill_feature<C>(stages, shape, how, loss, saved);
    } else {
      icsd::cpu::distill_streamed<C>(stages, shape, how, loss, saved);
    }
  });
}

template <Regime kRegime>
void distill_many_backward(std::uintptr_t grad_address, std::uintptr_t saved_address,
                           const std::vector<FeaturesTuple>& tuples, const std::vector<FeaturesTuple>& out_tuples,
                           int64_t groups, int64_t samples, const std::vector<double>& weights, int divergence,
                           const std::vector<double>& parameters, double eps, bool teacher_gradient) {
  const Shape shape = shape_of(groups, samples);
  const std::vector<Features> stages = stages_of(tuples, shape);
  const Distillation how = distillation_of(stages, weights, divergence, parameters, eps, teacher_gradient);
  const std::vector<Features> outs = results_of(out_tuples, stages, shape);
  const int64_t elements = product(groups, saved_numbers<kRegime>(stages, shape), 1);
  with_compute_type(any_wide(stages), [&](auto c) {
    using C = decltype(c);
    const C* grad = matrix_at<C>(grad_address, groups, "grad");
    const auto* saved = matrix_at<Saved<kRegime, C>>(saved_address, elements, "saved");
    check_apart(blocks_of(outs, shape, "out"), {block_of(grad, groups, "grad"), block_of(saved, elements, "saved")});
    py::gil_scoped_release unlocked;
    if constexpr (kRegime == Regime::feature) {
      icsd::cpu::distill_feature_backward<C>(grad, saved, stages, outs, shape, how);
    } else {
      icsd::cpu::distill_streamed_backward<C>(grad, saved, stages, outs, shape, how);
    }
  });
}

template <Regime kRegime>
void define_many(py::module_& m, const std::string& name) {
  m.def(name.c_str(), &distill_many<kRegime>, py::arg("stages"), py::arg("groups"), py::arg("samples"),
        py::arg("weights"), py::arg("divergence"), py::arg("parameters"), py::arg("eps"), py::arg("teacher_gradient"),
        py::arg("loss"), py::arg("saved"));
  m.def((name + "_backward").c_str(), &distill_many_backward<kRegime>, py::arg("grad"), py::arg("saved"),
        py::arg("stages"), py::arg("outs"), py::arg("groups"), py::arg("samples"), py::arg("weights"),
        py::arg("divergence"), py::arg("parameters"), py::arg("eps"), py::arg("teacher_gradient"));
}

#ifdef ICSD_CUDA
namespace cuda {

// An address on the device; the stream is a cudaStream_t of the current device.
template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::vector<Features> checked_stages(const std::vector<FeaturesTuple>& tuples, Shape shape) {
  if (shape.samples > std::numeric_limits<int>::max() / 2) refuse("more samples than 32 bits count");
  if (tuples.size() > icsd::cuda::kMaxStages) {
    refuse("a call takes at most " + std::to_string(icsd::cuda::kMaxStages) + " stages, got " +
           std::to_string(tuples.size()) + "; add the losses of several calls up");
  }
  return stages_of(tuples, shape);
}

std::size_t gram_workspace(const FeaturesTuple& x_tuple, int64_t groups, int64_t samples) {
  const Shape shape = shape_of(groups, samples);
  return icsd::cuda::gram_workspace(checked_stages({x_tuple}, shape)[0], shape);
}

void gram(const FeaturesTuple& x_tuple, int64_t groups, int64_t samples, std::uintptr_t out, std::uintptr_t workspace,
          std::uintptr_t stream) {
  const Shape shape = shape_of(groups, samples);
  const Features x = checked_stages({x_tuple}, shape)[0];
  with_compute_type(any_wide({x}), [&](auto c) {
    using C = decltype(c);
    C* matrix = matrix_at<C>(out, product(groups, samples, samples), "out");
    icsd::cuda::gram<C>(x, shape, matrix, at<void>(workspace), at<void>(stream));
  });
}

void combine(std::uintptr_t matrix_address, int64_t outputs, const FeaturesTuple& x_tuple, int64_t groups,
             int64_t samples, const FeaturesTuple& out_tuple, std::uintptr_t stream) {
  const Shape shape = shape_of(groups, samples), out_shape = shape_of(groups, outputs);
  const Features x = checked_stages({x_tuple}, shape)[0], out = features_of(out_tuple, out_shape, "out");
  check_result(out, outputs, x, shape, "out");
  with_compute_type(any_wide({x}), [&](auto c) {
    using C = decltype(c);
    const int64_t elements = product(groups, outputs, samples);
    const C* matrix = matrix_at<C>(matrix_address, elements, "matrix");
    check_apart({block_of(out, out_shape, "out")}, {block_of(x, shape, "x"), block_of(matrix, elements, "matrix")});
    icsd::cuda::combine<C>(matrix, outputs, x, out, shape, at<void>(stream));
  });
}

std::size_t distill_workspace(const std::vector<FeaturesTuple>& tuples, int64_t groups, int64_t samples, int divergence,
                              bool save) {
  const Shape shape = shape_of(groups, samples);
  const std::vector<Features> stages = checked_stages(tuples, shape);
  if (stages.empty()) refuse("there is no teacher");
  std::size_t bytes = 0;
  with_compute_type(any_wide(stages), [&](auto c) {
    bytes = icsd::cuda::distill_workspace<decltype(c)>(stages, shape, static_cast<icsd::DivergenceKind>(divergence), save);
  });
  return bytes;
}

void distill(const std::vector<FeaturesTuple>& tuples, int64_t groups, int64_t samples,
             const std::vector<double>& weights, int divergence, const std::vector<double>& parameters, double eps,
             bool teacher_gradient, std::uintptr_t loss_address, std::uintptr_t slots_address, std::uintptr_t workspace,
             std::uintptr_t stream) {
  const Shape shape = shape_of(groups, samples);
  const std::vector<Features> stages = checked_stages(tuples, shape);
  const Distillation how = distillation_of(stages, weights, divergence, parameters, eps, teacher_gradient);
  with_compute_type(any_wide(stages), [&](auto c) {
    using C = decltype(c);
    C* loss = matrix_at<C>(loss_address, groups, "loss");
    icsd::cuda::distill<C>(stages, shape, how, loss, at<C>(slots_address), at<void>(workspace), at<void>(stream));
  });
}

void distill_backward(std::uintptr_t grad_address, std::uintptr_t slots_address,
                      const std::vector<FeaturesTuple>& tuples, const std::vector<FeaturesTuple>& out_tuples, bool wide,
                      int64_t groups, int64_t samples, std::uintptr_t stream) {
  const Shape shape = shape_of(groups, samples);
  const std::vector<Features> stages = checked_stages(tuples, shape);
  const std::vector<Features> outs = results_of(out_tuples, stages, shape);
  with_compute_type(wide, [&](auto c) {
    using C = decltype(c);
    const C* grad = matrix_at<C>(grad_address, groups, "grad");
    const int64_t elements = product(static_cast<int64_t>(stages.size()), groups, samples * (samples + 1));
    const C* slots = matrix_at<C>(slots_address, elements, "slots");
    icsd::cuda::distill_backward<C>(grad, slots, stages, outs, shape, at<void>(stream));
  });
}

void check_feature_space(const std::vector<Features>& stages) {
  if (stages.empty()) refuse("there is no teacher");
  for (const Features& stage : stages) {
    if (stage.dtype != stages[0].dtype) refuse("stages of feature space are of one type");
    if (stage.features > std::numeric_limits<int>::max() / 2) refuse("more features than 32 bits count");
  }
}

std::size_t feature_workspace(const std::vector<FeaturesTuple>& tuples, int64_t groups, int64_t samples, bool save) {
  const Shape shape = shape_of(groups, samples);
  const std::vector<Features> stages = checked_stages(tuples, shape);
  check_feature_space(stages);
  product(groups, saved_numbers<Regime::feature>(stages, shape), 1);
  return icsd::cuda::feature_workspace(stages, shape, save);
}

void distill_feature(const std::vector<FeaturesTuple>& tuples, int64_t groups, int64_t samples,
                     const std::vector<double>& weights, int divergence, const std::vector<double>& parameters, double eps,
                     bool teacher_gradient, std::uintptr_t loss_address, std::uintptr_t moments_address,
                     std::uintptr_t workspace, std::uintptr_t stream) {
  const Shape shape = shape_of(groups, samples);
  const std::vector<Features> stages = checked_stages(tuples, shape);
  check_feature_space(stages);
  const Distillation how = distillation_of(stages, weights, divergence, parameters, eps, teacher_gradient);
  if (how.divergence != icsd::DivergenceKind::mse) refuse("feature space knows only mse");
  with_compute_type(any_wide(stages), [&](auto c) {
    using C = decltype(c);
    C* loss = matrix_at<C>(loss_address, groups, "loss");
    icsd::cuda::distill_feature<C>(stages, shape, how, loss, at<double>(moments_address), at<void>(workspace),
                                   at<void>(stream));
  });
}

std::size_t feature_backward_workspace(const std::vector<FeaturesTuple>& tuples, int64_t groups, int64_t samples) {
  const Shape shape = shape_of(groups, samples);
  const std::vector<Features> stages = checked_stages(tuples, shape);
  check_feature_space(stages);
  return icsd::cuda::feature_backward_workspace(stages, shape);
}

void distill_feature_backward(std::uintptr_t grad_address, std::uintptr_t moments_address,
                              const std::vector<FeaturesTuple>& tuples, const std::vector<FeaturesTuple>& out_tuples,
                              int64_t groups, int64_t samples, const std::vector<double>& weights, int divergence,
                              const std::vector<double>& parameters, double eps, bool teacher_gradient,
                              std::uintptr_t workspace, std::uintptr_t stream) {
  const Shape shape = shape_of(groups, samples);
  const std::vector<Features> stages = checked_stages(tuples, shape);
  check_feature_space(stages);
  const Distillation how = distillation_of(stages, weights, divergence, parameters, eps, teacher_gradient);
  const std::vector<Features> outs = results_of(out_tuples, stages, shape);
  const int64_t elements = product(groups, saved_numbers<Regime::feature>(stages, shape), 1);
  with_compute_type(any_wide(stages), [&](auto c) {
    using C = decltype(c);
    const C* grad = matrix_at<C>(grad_address, groups, "grad");
    const double* moments = matrix_at<double>(moments_address, elements, "moments");
    icsd::cuda::distill_feature_backward<C>(grad, moments, stages, outs, shape, how, at<void>(workspace), at<void>(stream));
  });
}

// Stages of one compute type.
bool wide_as_one(const std::vector<Features>& stages) {
  if (stages.empty()) refuse("there is no teacher");
  const bool wide = any_wide(stages);
  for (const Features& stage : stages) {
    if ((stage.dtype == DType::float64) != wide) refuse("float64 streams with float64 alone");
  }
  return wide;
}

std::size_t streamed_workspace(const std::vector<FeaturesTuple>& tuples, int64_t groups, int64_t samples,
                               bool teacher_gradient, bool save, int64_t band_bytes) {
  const Shape shape = shape_of(groups, samples);
  const std::vector<Features> stages = checked_stages(tuples, shape);
  std::size_t bytes = 0;
  with_compute_type(wide_as_one(stages), [&](auto c) {
    bytes = icsd::cuda::streamed_workspace<decltype(c)>(stages, shape, teacher_gradient, save, band_bytes);
  });
  return bytes;
}

void distill_streamed(const std::vector<FeaturesTuple>& tuples, int64_t groups, int64_t samples,
                      const std::vector<double>& weights, int divergence, const std::vector<double>& parameters,
                      double eps, bool teacher_gradient, std::uintptr_t loss_address, std::uintptr_t saved_address,
                      int64_t band_bytes, std::uintptr_t workspace, std::uintptr_t stream) {
  const Shape shape = shape_of(groups, samples);
  const std::vector<Features> stages = checked_stages(tuples, shape);
  const Distillation how = distillation_of(stages, weights, divergence, parameters, eps, teacher_gradient);
  with_compute_type(wide_as_one(stages), [&](auto c) {
    using C = decltype(c);
    C* loss = matrix_at<C>(loss_address, groups, "loss");
    icsd::cuda::distill_streamed<C>(stages, shape, how, loss, at<C>(saved_address), band_bytes, at<void>(workspace),
                                     at<void>(stream));
  });
}

void distill_streamed_backward(std::uintptr_t grad_address, std::uintptr_t saved_address,
                               const std::vector<FeaturesTuple>& tuples, const std::vector<FeaturesTuple>& out_tuples,
                               int64_t groups, int64_t samples, const std::vector<double>& weights, int divergence,
                               const std::vector<double>& parameters, double eps, bool teacher_gradient,
                               int64_t band_bytes, std::uintptr_t workspace, std::uintptr_t stream) {
  const Shape shape = shape_of(groups, samples);
  const std::vector<Features> stages = checked_stages(tuples, shape);
  const std::vector<Features> outs = results_of(out_tuples, stages, shape);
  const Distillation how = distillation_of(stages, weights, divergence, parameters, eps, teacher_gradient);
  with_compute_type(wide_as_one(stages), [&](auto c) {
    using C = decltype(c);
    const C* grad = matrix_at<C>(grad_address, groups, "grad");
    const C* saved = matrix_at<C>(saved_address, groups * samples, "saved");
    icsd::cuda::distill_streamed_backward<C>(grad, saved, stages, outs, shape, how, band_bytes, at<void>(workspace),
                                              at<void>(stream));
  });
}

}  // namespace cuda
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Fused kernels on raw pointers; use icsd.ops, which checks tensors and keeps them alive.";
  m.def("gram", &gram, py::arg("x"), py::arg("groups"), py::arg("samples"), py::arg("out"));
  m.def("combine", &combine, py::arg("matrix"), py::arg("outputs"), py::arg("x"), py::arg("groups"), py::arg("samples"),
        py::arg("out"));
  m.def("distill", &distill, py::arg("stages"), py::arg("groups"), py::arg("samples"), py::arg("weights"),
        py::arg("divergence"), py::arg("parameters"), py::arg("eps"), py::arg("teacher_gradient"), py::arg("loss"),
        py::arg("slots"));
  m.def("distill_backward", &distill_backward, py::arg("grad"), py::arg("slots"), py::arg("stages"), py::arg("outs"),
        py::arg("wide"), py::arg("groups"), py::arg("samples"));
  define_many<Regime::feature>(m, "distill_feature");
  define_many<Regime::streamed>(m, "distill_streamed");
  py::class_<icsd::cpu::Allocation>(m, "Allocation", py::buffer_protocol(), py::module_local(),
                                    "Writable memory without a value.")
      .def(py::init(&allocate), py::arg("bytes"))
      .def_buffer([](const icsd::cpu::Allocation& memory) {
        return py::buffer_info(static_cast<unsigned char*>(memory.data()), static_cast<py::ssize_t>(memory.bytes()));
      });
  m.def("empty_cache", &icsd::cpu::empty_cache);
  m.attr("LARGE_BYTES") = icsd::cpu::kLargeBytes;
#ifdef ICSD_CUDA
  py::module_ device = m.def_submodule("cuda", "The same on the current CUDA device, enqueued on a stream.");
  device.def("gram_workspace", &cuda::gram_workspace, py::arg("x"), py::arg("groups"), py::arg("samples"));
  device.def("gram", &cuda::gram, py::arg("x"), py::arg("groups"), py::arg("samples"), py::arg("out"),
             py::arg("workspace"), py::arg("stream"));
  device.def("combine", &cuda::combine, py::arg("matrix"), py::arg("outputs"), py::arg("x"), py::arg("groups"),
             py::arg("samples"), py::arg("out"), py::arg("stream"));
  device.def("distill_workspace", &cuda::distill_workspace, py::arg("stages"), py::arg("groups"), py::arg("samples"),
             py::arg("divergence"), py::arg("save"));
  device.def("distill", &cuda::distill, py::arg("stages"), py::arg("groups"), py::arg("samples"), py::arg("weights"),
             py::arg("divergence"), py::arg("parameters"), py::arg("eps"), py::arg("teacher_gradient"), py::arg("loss"),
             py::arg("slots"), py::arg("workspace"), py::arg("stream"));
  device.def("distill_backward", &cuda::distill_backward, py::arg("grad"), py::arg("slots"), py::arg("stages"),
             py::arg("outs"), py::arg("wide"), py::arg("groups"), py::arg("samples"), py::arg("stream"));
  device.def("feature_workspace", &cuda::feature_workspace, py::arg("stages"), py::arg("groups"), py::arg("samples"),
             py::arg("save"));
  device.def("distill_feature", &cuda::distill_feature, py::arg("stages"), py::arg("groups"), py::arg("samples"),
             py::arg("weights"), py::arg("divergence"), py::arg("parameters"), py::arg("eps"), py::arg("teacher_gradient"),
             py::arg("loss"), py::arg("moments"), py::arg("workspace"), py::arg("stream"));
  device.def("feature_backward_workspace", &cuda::feature_backward_workspace, py::arg("stages"), py::arg("groups"),
             py::arg("samples"));
  device.def("distill_feature_backward", &cuda::distill_feature_backward, py::arg("grad"), py::arg("moments"),
             py::arg("stages"), py::arg("outs"), py::arg("groups"), py::arg("samples"), py::arg("weights"),
             py::arg("divergence"), py::arg("parameters"), py::arg("eps"), py::arg("teacher_gradient"),
             py::arg("workspace"), py::arg("stream"));
  device.def("streamed_workspace", &cuda::streamed_workspace, py::arg("stages"), py::arg("groups"), py::arg("samples"),
             py::arg("teacher_gradient"), py::arg("save"), py::arg("band_bytes"));
  device.def("distill_streamed", &cuda::distill_streamed, py::arg("stages"), py::arg("groups"), py::arg("samples"),
             py::arg("weights"), py::arg("divergence"), py::arg("parameters"), py::arg("eps"), py::arg("teacher_gradient"),
             py::arg("loss"), py::arg("saved"), py::arg("band_bytes"), py::arg("workspace"), py::arg("stream"));
  device.def("distill_streamed_backward", &cuda::distill_streamed_backward, py::arg("grad"), py::arg("saved"),
             py::arg("stages"), py::arg("outs"), py::arg("groups"), py::arg("samples"), py::arg("weights"),
             py::arg("divergence"), py::arg("parameters"), py::arg("eps"), py::arg("teacher_gradient"),
             py::arg("band_bytes"), py::arg("workspace"), py::arg("stream"));
  device.def("launches", &icsd::cuda::launches, "Kernels launched by this process so far.");
  device.def("devices", [] {
    const icsd::cuda::Devices devices = icsd::cuda::devices();
    return py::make_tuple(devices.count, devices.error);
  });
#endif
  m.def("cpu_isa", [] { return icsd::cpu::kernels().isa; });
  m.attr("build") = py::dict(py::arg("compiler") = ICSD_COMPILER, py::arg("cpu") = ICSD_CPU_ISAS,
                             py::arg("cuda") = ICSD_CUDA_ARCHITECTURES);
}
