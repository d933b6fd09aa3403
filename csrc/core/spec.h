// The specification of what a distillation computes. One serves all calls of the same configuration.
#pragma once

#include <vector>

#include "core/losses.h"

namespace icsd {

enum class Regime { sample, feature, streamed };

struct Spec {
  LossKind loss;
  std::vector<double> parameters;  // of the loss
  std::vector<double> weights;     // one for each student
  double eps;                      // least norm of a sample
  bool teacher_gradient;           // the backward pass may ask for it
  Regime regime;
  bool center;  // the mean sample of each group is subtracted before samples are compared; in the regime sample
};

}  // namespace icsd
