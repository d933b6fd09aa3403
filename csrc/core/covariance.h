// Computes `mse` of many samples from the (uncentered) covariances of their features. With X̂ the samples of norm 1,
//   |X̂X̂ᵀ - ŶŶᵀ|² = |X̂ᵀX̂|² - 2 |X̂ᵀŶ|² + |ŶᵀŶ|²,    d/dX̂ = 4 (X̂ (X̂ᵀX̂) - Ŷ (ŶᵀX̂)),
// so that no matrix has more than D x D elements.
//
// The three terms cancel as S approaches T. Products of float32 are summed in float64. If less than kLeastRemainder of
// the terms remains, loss and gradient are computed again from products in float64.
#pragma once

#include <cstdint>
#include <vector>

#include "core/features.h"
#include "core/math.h"

namespace icsd {

constexpr double kLeastRemainder = 1e-2;

// One of the matrices: left features x right features. It is symmetric if both are of the same stage.
struct Covariance {
  std::int64_t left, right;  // stages
  std::int64_t rows, columns, offset;
};

// Returns the matrices of a group, one after the other: for every student X̂ᵀX̂ (D, D) and X̂ᵀŶ (D, D_teacher), then ŶᵀŶ.
inline std::vector<Covariance> covariances_of(const std::vector<Features>& stages) {
  std::vector<Covariance> covariances;
  const std::int64_t teacher = static_cast<std::int64_t>(stages.size()) - 1;
  std::int64_t offset = 0;
  const auto add = [&](std::int64_t left, std::int64_t right) {
    covariances.push_back({left, right, stages[left].dim, stages[right].dim, offset});
    offset += stages[left].dim * stages[right].dim;
  };
  for (std::int64_t k = 0; k < teacher; ++k) {
    add(k, k);
    add(k, teacher);
  }
  add(teacher, teacher);
  return covariances;
}

// Returns the elements of all matrices of a group.
inline std::int64_t covariance_elements(const std::vector<Features>& stages) {
  const Covariance last = covariances_of(stages).back();
  return last.offset + last.rows * last.columns;
}

struct Remainder {
  double squares;   // |S - T|²
  double fraction;  // of |S|² + |T|²
};

// Computes what remains of |X̂ᵀX̂|², |X̂ᵀŶ|² and |ŶᵀŶ|².
ICSD_HD Remainder remainder_of(double s, double both, double t) {
  const double left = (s - both) + (t - both);
  return {left < 0 ? 0 : left, left / (s + t)};
}

}  // namespace icsd
