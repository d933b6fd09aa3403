// What a distillation is asked to compute, whichever backend does.
#pragma once

#include "core/losses.h"

namespace icsd {

struct Distillation {
  LossKind loss;
  const double* parameters;
  const double* weights;  // one for each student
  double eps;
  bool teacher_gradient;
};

}  // namespace icsd
