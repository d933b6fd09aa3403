// The divergences d(S, T), one definition for host and device.
//
// A divergence is a struct with
//   Row                       what one row of (S, T) leaves behind
//   update(row, s, t)         takes one element of the row
//   value(row)                the row's part of the loss
//   student(s, t, i, j)       dL/dS_ij + dL/dS_ji, from the rows i and j
//   teacher(s, t, i, j)       dL/dT_ij + dL/dT_ji
//   diagonal                  whether the diagonal takes part
// S and T are symmetric, so both gradients are of the symmetrised element.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define ICSD_HD __host__ __device__ inline
#else
#define ICSD_HD inline
#endif

namespace icsd {

enum class DivergenceKind : int { mse = 0, kl = 1, smooth_l1 = 2 };

template <class T>
struct Mse {
  static constexpr bool diagonal = true;
  T scale;  // 1 / N²

  Mse(const double*, T n) : scale(1 / (n * n)) {}

  struct Row {
    T sum = 0;
  };
  ICSD_HD void update(Row& row, T s, T t) const { row.sum += (s - t) * (s - t); }
  ICSD_HD T value(const Row& row) const { return scale * row.sum; }
  ICSD_HD T student(T s, T t, const Row&, const Row&) const { return 4 * scale * (s - t); }
  ICSD_HD T teacher(T s, T t, const Row&, const Row&) const { return 4 * scale * (t - s); }
};

template <class T>
struct SmoothL1 {
  static constexpr bool diagonal = true;
  T scale, beta;

  SmoothL1(const double* parameters, T n) : scale(1 / (n * n)), beta(static_cast<T>(parameters[0])) {}

  struct Row {
    T sum = 0;
  };
  ICSD_HD void update(Row& row, T s, T t) const {
    const T x = std::abs(s - t);
    row.sum += x < beta ? x * x / (2 * beta) : x - beta / 2;
  }
  ICSD_HD T value(const Row& row) const { return scale * row.sum; }
  ICSD_HD T student(T s, T t, const Row&, const Row&) const {
    const T x = s - t;
    return 2 * scale * (x >= beta ? T(1) : x <= -beta ? T(-1) : x / beta);
  }
  ICSD_HD T teacher(T s, T t, const Row& i, const Row& j) const { return student(t, s, i, j); }
};

// KL(softmax(T/τ_t) || softmax(S/τ_s)) by online softmax: with m the running maxima, l the sums of exponentials below
// them and w = Σ e^{t-m_t} ((t-m_t) - (s-m_s)), KL = w/l_t + ln(l_s/l_t). Everything is relative to the maxima, so that
// low temperatures cancel nothing.
template <class T>
struct Kl {
  bool diagonal;
  T scale, inverse_student, inverse_teacher;

  Kl(const double* parameters, T n)
      : diagonal(parameters[2] != 0),
        scale(1 / n),
        inverse_student(static_cast<T>(1 / parameters[0])),
        inverse_teacher(static_cast<T>(1 / parameters[1])) {}

  struct Row {
    T max_s = -INFINITY, max_t = -INFINITY;
    T sum_s = 0, sum_t = 0;
    T weighted = 0;
  };
  ICSD_HD void update(Row& row, T s, T t) const {
    s *= inverse_student;
    t *= inverse_teacher;
    if (!(s <= row.max_s)) {  // also true of NaN, which then spreads to the row
      const T rise = row.sum_s == 0 ? T(0) : s - row.max_s;
      row.sum_s *= std::exp(-rise);
      row.weighted += row.sum_t * rise;
      row.max_s = s;
    }
    if (!(t <= row.max_t)) {
      const T rise = row.sum_t == 0 ? T(0) : t - row.max_t, shrink = std::exp(-rise);
      row.weighted = shrink * (row.weighted - row.sum_t * rise);
      row.sum_t *= shrink;
      row.max_t = t;
    }
    const T below_s = s - row.max_s, below_t = t - row.max_t, e = std::exp(below_t);
    row.sum_s += std::exp(below_s);
    row.sum_t += e;
    row.weighted += e * (below_t - below_s);
  }
  ICSD_HD T value(const Row& row) const {
    if (row.sum_t == 0) return 0;  // nothing took part: a single sample without its diagonal
    return scale * (row.weighted / row.sum_t + std::log(row.sum_s / row.sum_t));
  }
  // One row's probabilities of element (s, t), and its part of the gradients.
  ICSD_HD T p(T s, const Row& row) const { return std::exp(s * inverse_student - row.max_s) / row.sum_s; }
  ICSD_HD T q(T t, const Row& row) const { return std::exp(t * inverse_teacher - row.max_t) / row.sum_t; }
  ICSD_HD T student(T s, T t, const Row& i, const Row& j) const {
    return scale * inverse_student * ((p(s, i) - q(t, i)) + (p(s, j) - q(t, j)));
  }
  ICSD_HD T teacher_row(T s, T t, const Row& row) const {
    const T below_s = s * inverse_student - row.max_s, below_t = t * inverse_teacher - row.max_t;
    return q(t, row) * (below_t - below_s - row.weighted / row.sum_t);
  }
  ICSD_HD T teacher(T s, T t, const Row& i, const Row& j) const {
    return scale * inverse_teacher * (teacher_row(s, t, i) + teacher_row(s, t, j));
  }
};

}  // namespace icsd
