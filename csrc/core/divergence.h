// The divergences d(S, T), one definition for the host, for its vectors and for the device.
//
// A divergence of scalar type T is a struct with
//   Row<V>                    what a part of one row of (S, T) leaves behind; V is T or a vector of T's, which then holds
//                             a part of the row in each of its lanes
//   update(row, s, t)         takes one element of the row
//   merge(row, other)         takes another part of the same row
//   value(row)                the whole row's part of the loss
//   statistics(row, out)      the kStatistics numbers of the whole row that gradients need
//   student(s, t, i, j)       dL/dS_ij + dL/dS_ji, from the statistics of the rows i and j
//   teacher(s, t, i, j)       dL/dT_ij + dL/dT_ji
//   diagonal                  whether the diagonal takes part
// S and T are symmetric, so both gradients are of the symmetrised element.
#pragma once

#include <cmath>

#include "core/math.h"

namespace icsd {

enum class DivergenceKind : int { mse = 0, kl = 1, smooth_l1 = 2 };
constexpr int kDivergences = 3;
constexpr int kMaxStatistics = 5;

template <class T>
struct Mse {
  static constexpr bool diagonal = true;
  static constexpr int kStatistics = 0;
  T scale;  // 1 / N²

  ICSD_HD Mse(const double*, T n) : scale(1 / (n * n)) {}

  template <class V>
  struct Row {
    V sum{};
  };
  template <class V>
  ICSD_HD void update(Row<V>& row, V s, V t) const {
    row.sum += (s - t) * (s - t);
  }
  ICSD_HD void merge(Row<T>& row, const Row<T>& other) const { row.sum += other.sum; }
  ICSD_HD T value(const Row<T>& row) const { return scale * row.sum; }
  ICSD_HD void statistics(const Row<T>&, T*) const {}
  template <class V>
  ICSD_HD V student(V s, V t, const V*, const V*) const {
    return 4 * scale * (s - t);
  }
  template <class V>
  ICSD_HD V teacher(V s, V t, const V*, const V*) const {
    return 4 * scale * (t - s);
  }
};

template <class T>
struct SmoothL1 {
  static constexpr bool diagonal = true;
  static constexpr int kStatistics = 0;
  T scale, beta;

  ICSD_HD SmoothL1(const double* parameters, T n) : scale(1 / (n * n)), beta(static_cast<T>(parameters[0])) {}

  template <class V>
  struct Row {
    V sum{};
  };
  template <class V>
  ICSD_HD void update(Row<V>& row, V s, V t) const {
    const V difference = s - t, x = difference < 0 ? -difference : difference;
    row.sum += x < beta ? x * x * (T(0.5) / beta) : x - T(0.5) * beta;
  }
  ICSD_HD void merge(Row<T>& row, const Row<T>& other) const { row.sum += other.sum; }
  ICSD_HD T value(const Row<T>& row) const { return scale * row.sum; }
  ICSD_HD void statistics(const Row<T>&, T*) const {}
  template <class V>
  ICSD_HD V student(V s, V t, const V*, const V*) const {
    const V x = s - t, one = V{} + 1;
    return 2 * scale * (x >= beta ? one : x <= -beta ? -one : x / beta);
  }
  template <class V>
  ICSD_HD V teacher(V s, V t, const V* i, const V* j) const {
    return student(t, s, i, j);
  }
};

// KL(softmax(T/τ_t) || softmax(S/τ_s)) by online softmax: with m the running maxima, l the sums of exponentials below
// them and w = Σ e^{(t-m_t)/τ_t} ((t-m_t)/τ_t - (s-m_s)/τ_s), KL = w/l_t + ln(l_s/l_t). Everything is relative to the
// maxima, so that low temperatures cancel nothing.
template <class T>
struct Kl {
  static constexpr int kStatistics = 5;
  bool diagonal;
  T scale, inverse_student, inverse_teacher;

  ICSD_HD Kl(const double* parameters, T n)
      : diagonal(parameters[2] != 0),
        scale(1 / n),
        inverse_student(static_cast<T>(1 / parameters[0])),
        inverse_teacher(static_cast<T>(1 / parameters[1])) {}

  template <class V>
  struct Row {
    V max_s = V{} - 2, max_t = V{} - 2;  // below any cosine
    V sum_s{}, sum_t{};
    V weighted{};
  };
  template <class V>
  ICSD_HD void raise(Row<V>& row, V max_s, V max_t) const {
    const V rise_s = (max_s - row.max_s) * inverse_student, rise_t = (max_t - row.max_t) * inverse_teacher;
    const V shrink_t = Math<V>::exp(-rise_t);
    row.weighted = shrink_t * (row.weighted + row.sum_t * (rise_s - rise_t));
    row.sum_s *= Math<V>::exp(-rise_s);
    row.sum_t *= shrink_t;
    row.max_s = max_s;
    row.max_t = max_t;
  }
  template <class V>
  ICSD_HD void update(Row<V>& row, V s, V t) const {
    if (Math<V>::any((s > row.max_s) | (t > row.max_t))) {
      raise(row, s > row.max_s ? s : row.max_s, t > row.max_t ? t : row.max_t);
    }
    const V below_s = (s - row.max_s) * inverse_student, below_t = (t - row.max_t) * inverse_teacher;
    const V e = Math<V>::exp(below_t);
    row.sum_s += Math<V>::exp(below_s);
    row.sum_t += e;
    row.weighted += e * (below_t - below_s);
  }
  ICSD_HD void merge(Row<T>& row, Row<T> other) const {
    const T max_s = row.max_s > other.max_s ? row.max_s : other.max_s;
    const T max_t = row.max_t > other.max_t ? row.max_t : other.max_t;
    raise(row, max_s, max_t);
    raise(other, max_s, max_t);
    row.sum_s += other.sum_s;
    row.sum_t += other.sum_t;
    row.weighted += other.weighted;
  }
  ICSD_HD T value(const Row<T>& row) const {
    if (row.sum_t == 0) return 0;  // nothing took part: a single sample without its diagonal
    return scale * (row.weighted / row.sum_t + std::log(row.sum_s / row.sum_t));
  }
  ICSD_HD void statistics(const Row<T>& row, T* out) const {
    out[0] = row.max_s;
    out[1] = 1 / row.sum_s;
    out[2] = row.max_t;
    out[3] = 1 / row.sum_t;
    out[4] = row.weighted / row.sum_t;
  }
  // One row's probabilities of element (s, t), and its part of the teacher's gradient.
  template <class V>
  ICSD_HD V p(V s, const V* row) const {
    return Math<V>::exp((s - row[0]) * inverse_student) * row[1];
  }
  template <class V>
  ICSD_HD V q(V t, const V* row) const {
    return Math<V>::exp((t - row[2]) * inverse_teacher) * row[3];
  }
  template <class V>
  ICSD_HD V student(V s, V t, const V* i, const V* j) const {
    return scale * inverse_student * ((p(s, i) - q(t, i)) + (p(s, j) - q(t, j)));
  }
  template <class V>
  ICSD_HD V teacher_row(V s, V t, const V* row) const {
    const V below_s = (s - row[0]) * inverse_student, below_t = (t - row[2]) * inverse_teacher;
    return q(t, row) * (below_t - below_s - row[4]);
  }
  template <class V>
  ICSD_HD V teacher(V s, V t, const V* i, const V* j) const {
    return scale * inverse_teacher * (teacher_row(s, t, i) + teacher_row(s, t, j));
  }
};

}  // namespace icsd
