// The row-wise losses of two matrices: one definition for scalars and vectors of the CPU and for CUDA devices.
//
// A loss of scalar type T is a struct, made of LossArguments<T>, with
//   kParameters               the number of its parameters; the last one is whether the diagonal takes part
//   kStatistics               the number of values of a row that its gradients need
//   similarities              whether s and t are cosine similarities S and T, or the products K of the samples
//   diagonal                  whether the diagonal takes part
//   Row<V>                    sums over a part of one row of (S, T); V is T or a vector of T, of which each lane then
//                             holds the sums over another part of the row
//   update(row, s, t)         adds one element of the row
//   merge(row, other)         adds another part of the same row
//   value(row)                the part of the loss that comes from the row
//   statistics(row, out)      the kStatistics values of the row that its gradients need
//   student(s, t, i, j)       dL/dS_ij + dL/dS_ji, from the statistics of the rows i and j
//   teacher(s, t, i, j)       dL/dT_ij + dL/dT_ji
// S and T are symmetric, so both gradients are of the symmetrized element. NaN passes through all of them.
#pragma once

#include <cmath>
#include <limits>
#include <stdexcept>

#include "core/math.h"

namespace icsd {

// All losses with kernels: the name, which Python uses too, and the struct. All tables with an entry for each loss are
// made from this list.
#define ICSD_LOSSES(X)   \
  X(mse, Mse)            \
  X(kl, Kl)              \
  X(smooth_l1, SmoothL1) \
  X(sp, Sp)              \
  X(cc, Cc)              \
  X(pkt, Pkt)            \
  X(dist, Dist)

#define ICSD_LOSS(name, Loss) name,
enum class LossKind : int { ICSD_LOSSES(ICSD_LOSS) };
#undef ICSD_LOSS
#define ICSD_LOSS(name, Loss) LossKind::name,
constexpr LossKind kAllLosses[] = {ICSD_LOSSES(ICSD_LOSS)};
#undef ICSD_LOSS
constexpr int kLosses = sizeof(kAllLosses) / sizeof(LossKind);

constexpr int kMaxStatistics = 5;

template <class T>
struct LossArguments {
  const double* parameters;  // on the host
  T samples;
  T eps;  // least norm of a sample
};

// Returns 1 / (the number of elements of the matrices), with or without their diagonals. A single sample has none.
template <class T>
ICSD_HD T per_element(T samples, bool diagonal) {
  const T columns = diagonal ? samples : samples - 1;
  return columns > 0 ? 1 / (samples * columns) : T(0);
}

// (s' - t')², where s' and t' are s and t, or 0 where they are clamped: negative similarities of both, or those of the
// teacher. A clamped element passes no gradient.
template <class T>
struct Mse {
  static constexpr int kParameters = 2, kStatistics = 0;
  static constexpr bool similarities = true;
  bool diagonal;
  T scale, least_s, least_t;  // the thresholds are 0, or below any cosine

  ICSD_HD explicit Mse(const LossArguments<T>& of)
      : diagonal(of.parameters[1] != 0),
        scale(per_element(of.samples, diagonal)),
        least_s(of.parameters[0] == 1 ? T(0) : T(-4)),
        least_t(of.parameters[0] != 0 ? T(0) : T(-4)) {}

  template <class V>
  ICSD_HD V difference(V s, V t) const {
    return (s < least_s ? V{} : s) - (t < least_t ? V{} : t);
  }

  template <class V>
  struct Row {
    V sum{};
  };
  template <class V>
  ICSD_HD void update(Row<V>& row, V s, V t) const {
    const V x = difference(s, t);
    row.sum += x * x;
  }
  ICSD_HD void merge(Row<T>& row, const Row<T>& other) const { row.sum += other.sum; }
  ICSD_HD T value(const Row<T>& row) const { return scale * row.sum; }
  ICSD_HD void statistics(const Row<T>&, T*) const {}
  template <class V>
  ICSD_HD V student(V s, V t, const V*, const V*) const {
    return difference(s, t) * (s < least_s ? V{} : V{} + 4 * scale);
  }
  template <class V>
  ICSD_HD V teacher(V s, V t, const V*, const V*) const {
    return difference(s, t) * (t < least_t ? V{} : V{} - 4 * scale);
  }
};

// The Huber function of |s - t| less a margin, 0 within the margin. β = 0 leaves its linear part alone.
template <class T>
struct SmoothL1 {
  static constexpr int kParameters = 3, kStatistics = 0;
  static constexpr bool similarities = true;
  bool diagonal;
  T scale, beta, margin;

  ICSD_HD explicit SmoothL1(const LossArguments<T>& of)
      : diagonal(of.parameters[2] != 0),
        scale(per_element(of.samples, diagonal)),
        beta(static_cast<T>(of.parameters[0])),
        margin(static_cast<T>(of.parameters[1])) {}

  template <class V>
  struct Row {
    V sum{};
  };
  template <class V>
  ICSD_HD void update(Row<V>& row, V s, V t) const {
    const V difference = s - t, x = (difference < 0 ? -difference : difference) - margin;
    const V huber = x < beta ? x * x * (T(0.5) / beta) : x - T(0.5) * beta;
    row.sum += x < 0 ? V{} : huber;
  }
  ICSD_HD void merge(Row<T>& row, const Row<T>& other) const { row.sum += other.sum; }
  ICSD_HD T value(const Row<T>& row) const { return scale * row.sum; }
  ICSD_HD void statistics(const Row<T>&, T*) const {}
  template <class V>
  ICSD_HD V student(V s, V t, const V*, const V*) const {
    const V difference = s - t, x = (difference < 0 ? -difference : difference) - margin, one = V{} + 1;
    const V slope = x <= 0 ? V{} : x >= beta ? one : x / beta;
    return 2 * scale * (difference < 0 ? -slope : slope);
  }
  template <class V>
  ICSD_HD V teacher(V s, V t, const V* i, const V* j) const {
    return student(t, s, i, j);
  }
};

// KL(softmax(T/τ_t) || softmax(S/τ_s)) by online softmax. With m the running maxima, l the sums of exponentials below
// them and w = Σ e^{(t-m_t)/τ_t} ((t-m_t)/τ_t - (s-m_s)/τ_s), KL = w/l_t + ln(l_s/l_t). Everything is relative to the
// maxima, so that low temperatures cancel nothing.
template <class T>
struct Kl {
  static constexpr int kParameters = 3, kStatistics = 5;
  static constexpr bool similarities = true;
  bool diagonal;
  T scale, inverse_student, inverse_teacher;

  ICSD_HD explicit Kl(const LossArguments<T>& of)
      : diagonal(of.parameters[2] != 0),
        scale(1 / of.samples),
        inverse_student(static_cast<T>(1 / of.parameters[0])),
        inverse_teacher(static_cast<T>(1 / of.parameters[1])) {}

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

// |k/|k| - l/|l||² = 2 (1 - ρ) of rows k of products and l of the teacher's, ρ = <k, l> / (|k| |l|). A row that
// vanishes has no direction and passes no gradient.
template <class T>
struct Sp {
  static constexpr int kParameters = 1, kStatistics = 3;
  static constexpr bool similarities = false;
  bool diagonal;
  T scale, least_square;

  ICSD_HD explicit Sp(const LossArguments<T>& of)
      : diagonal(of.parameters[0] != 0),
        scale(per_element(of.samples, diagonal)),
        least_square(of.eps * of.eps * (of.eps * of.eps)) {}

  template <class V>
  struct Row {
    V ss{}, tt{}, st{};
  };
  template <class V>
  ICSD_HD void update(Row<V>& row, V s, V t) const {
    row.ss += s * s;
    row.tt += t * t;
    row.st += s * t;
  }
  ICSD_HD void merge(Row<T>& row, const Row<T>& other) const {
    row.ss += other.ss;
    row.tt += other.tt;
    row.st += other.st;
  }
  ICSD_HD bool vanishes(T square) const { return square <= least_square; }
  // Divides before it multiplies: squares of squares leave the range of float32.
  static ICSD_HD T disagreement(const Row<T>& row) { return 1 - row.st / row.ss * std::sqrt(row.ss / row.tt); }

  ICSD_HD T value(const Row<T>& row) const {
    const bool no_s = vanishes(row.ss), no_t = vanishes(row.tt);
    const T zero = (row.ss - row.ss) + (row.tt - row.tt);
    if (zero != 0) return zero;  // NaN, which no row that vanishes hides
    if (no_s || no_t) return no_s && no_t ? 0 : scale;
    return 2 * scale * disagreement(row);
  }
  ICSD_HD void statistics(const Row<T>& row, T* out) const {
    const bool no_s = vanishes(row.ss), no_t = vanishes(row.tt);
    out[0] = no_s ? 0 : 1 / std::sqrt(row.ss);
    out[1] = no_t ? 0 : 1 / std::sqrt(row.tt);
    out[2] = no_s || no_t ? 1 : disagreement(row);
  }
  template <class V>
  static ICSD_HD V student_row(V s, V t, const V* row) {
    const V u = s * row[0], v = t * row[1];
    return row[0] * ((u - v) - row[2] * u);
  }
  template <class V>
  static ICSD_HD V teacher_row(V s, V t, const V* row) {
    const V u = s * row[0], v = t * row[1];
    return row[1] * ((v - u) - row[2] * v);
  }
  template <class V>
  ICSD_HD V student(V s, V t, const V* i, const V* j) const {
    return 2 * scale * (student_row(s, t, i) + student_row(s, t, j));
  }
  template <class V>
  ICSD_HD V teacher(V s, V t, const V* i, const V* j) const {
    return 2 * scale * (teacher_row(s, t, i) + teacher_row(s, t, j));
  }
};

// (κ(s) - κ(t))², κ the identity of products or e^{-2γ} Σ_{1 <= p <= P} (2γ s)^p / p! of similarities; the constant
// term would cancel.
template <class T>
struct Cc {
  static constexpr int kParameters = 4, kStatistics = 0;
  bool similarities, diagonal;
  T scale, twice_gamma, factor;
  int order;

  ICSD_HD explicit Cc(const LossArguments<T>& of)
      : similarities(of.parameters[0] != 0),
        diagonal(of.parameters[3] != 0),
        scale(per_element(of.samples, diagonal)),
        twice_gamma(static_cast<T>(2 * of.parameters[1])),
        factor(static_cast<T>(std::exp(-2 * of.parameters[1]))),
        order(static_cast<int>(of.parameters[2])) {}

  // Σ_{1 <= p <= order} x^p / p!
  template <class V>
  static ICSD_HD V series(V x, int order) {
    V sum{};
    for (int power = order; power > 0; --power) sum = (sum + 1) * x * (T(1) / static_cast<T>(power));
    return sum;
  }
  template <class V>
  ICSD_HD V kernel(V x) const {
    return similarities ? factor * series(twice_gamma * x, order) : x;
  }
  template <class V>
  ICSD_HD V slope(V x) const {
    return similarities ? factor * twice_gamma * (series(twice_gamma * x, order - 1) + 1) : V{} + 1;
  }

  template <class V>
  struct Row {
    V sum{};
  };
  template <class V>
  ICSD_HD void update(Row<V>& row, V s, V t) const {
    const V difference = kernel(s) - kernel(t);
    row.sum += difference * difference;
  }
  ICSD_HD void merge(Row<T>& row, const Row<T>& other) const { row.sum += other.sum; }
  ICSD_HD T value(const Row<T>& row) const { return scale * row.sum; }
  ICSD_HD void statistics(const Row<T>&, T*) const {}
  template <class V>
  ICSD_HD V student(V s, V t, const V*, const V*) const {
    return 4 * scale * (kernel(s) - kernel(t)) * slope(s);
  }
  template <class V>
  ICSD_HD V teacher(V s, V t, const V* i, const V* j) const {
    return student(t, s, i, j);
  }
};

// KL(q || p) with p = a/Σa, a = (S + 1)/2, and q = b/Σb of the teacher: Σ b ln(b/a) / Σb + ln(Σa/Σb).
template <class T>
struct Pkt {
  static constexpr int kParameters = 1, kStatistics = 3;
  static constexpr bool similarities = true;
  static constexpr T kLeast = T(0.5e-7);  // replaces the affinity 0 of opposite samples, which has no logarithm
  bool diagonal;
  T scale;

  ICSD_HD explicit Pkt(const LossArguments<T>& of) : diagonal(of.parameters[0] != 0), scale(1 / of.samples) {}

  template <class V>
  static ICSD_HD V affinity(V s) {
    const V a = s * T(0.5) + T(0.5);
    return a < kLeast ? V{} + kLeast : a;
  }
  // The derivative of the affinity: 0 where kLeast replaces it.
  template <class V>
  static ICSD_HD V slope(V s) {
    return s * T(0.5) + T(0.5) < kLeast ? V{} : V{} + T(0.5);
  }

  template <class V>
  struct Row {
    V sum_s{}, sum_t{};
    V weighted{};
  };
  template <class V>
  ICSD_HD void update(Row<V>& row, V s, V t) const {
    const V a = affinity(s), b = affinity(t);
    row.sum_s += a;
    row.sum_t += b;
    row.weighted += b * Math<V>::log(b / a);
  }
  ICSD_HD void merge(Row<T>& row, const Row<T>& other) const {
    row.sum_s += other.sum_s;
    row.sum_t += other.sum_t;
    row.weighted += other.weighted;
  }
  ICSD_HD T value(const Row<T>& row) const {
    if (row.sum_t == 0) return 0;  // nothing took part: a single sample
    return scale * (row.weighted / row.sum_t + std::log(row.sum_s / row.sum_t));
  }
  ICSD_HD void statistics(const Row<T>& row, T* out) const {
    out[0] = 1 / row.sum_s;
    out[1] = 1 / row.sum_t;
    out[2] = row.weighted / row.sum_t;
  }
  template <class V>
  ICSD_HD V student(V s, V t, const V* i, const V* j) const {
    const V ratio = affinity(t) / affinity(s);
    return scale * slope(s) * ((i[0] - ratio * i[1]) + (j[0] - ratio * j[1]));
  }
  template <class V>
  ICSD_HD V teacher(V s, V t, const V* i, const V* j) const {
    const V difference = Math<V>::log(affinity(t) / affinity(s));
    return scale * slope(t) * (i[1] * (difference - i[2]) + j[1] * (difference - j[2]));
  }
};

// 1 - ρ, Pearson's correlation of rows, by Welford's running means and sums of squares about them; with a² and b² those
// of s and t and d² that of s - t, 1 - ρ = (d² - (a - b)²) / 2ab, which cancels little where S and T agree. It cancels
// more than 1 - <s, t> / ab where a and b are far apart, as where eps replaces norms. Variation within the noise of
// rounding counts as none: such a row has no direction and passes no gradient.
template <class T>
struct Dist {
  static constexpr int kParameters = 1, kStatistics = 5;
  static constexpr bool similarities = true;
  bool diagonal;
  T scale;

  ICSD_HD explicit Dist(const LossArguments<T>& of) : diagonal(of.parameters[0] != 0), scale(1 / of.samples) {}

  template <class V>
  struct Row {
    V count{}, mean_s{}, mean_t{}, ss{}, tt{}, st{}, dd{};
  };
  template <class V>
  ICSD_HD void update(Row<V>& row, V s, V t) const {
    row.count += 1;
    const V share = 1 / row.count, rest = 1 - share, from_s = s - row.mean_s, from_t = t - row.mean_t;
    row.mean_s += from_s * share;
    row.mean_t += from_t * share;
    row.ss += from_s * from_s * rest;
    row.tt += from_t * from_t * rest;
    row.st += from_s * from_t * rest;
    row.dd += (from_s - from_t) * (from_s - from_t) * rest;
  }
  ICSD_HD void merge(Row<T>& row, const Row<T>& other) const {
    if (other.count == 0) return;
    const T count = row.count + other.count, share = other.count / count, weight = row.count * share;
    const T from_s = other.mean_s - row.mean_s, from_t = other.mean_t - row.mean_t;
    row.count = count;
    row.mean_s += from_s * share;
    row.mean_t += from_t * share;
    row.ss += other.ss + from_s * from_s * weight;
    row.tt += other.tt + from_t * from_t * weight;
    row.st += other.st + from_s * from_t * weight;
    row.dd += other.dd + (from_s - from_t) * (from_s - from_t) * weight;
  }
  static ICSD_HD bool vanishes(T square, T mean, T count) {
    constexpr T noise = 8 * std::numeric_limits<T>::epsilon();  // NOISE of icsd/losses/base.py
    return square <= noise * noise * (square + count * mean * mean);
  }
  // 1 - ρ; 0 for two constant rows, 1 for one.
  static ICSD_HD T disagreement(const Row<T>& row) {
    const bool no_s = vanishes(row.ss, row.mean_s, row.count), no_t = vanishes(row.tt, row.mean_t, row.count);
    if (no_s || no_t) return no_s && no_t ? 0 : 1 + 0 * (row.ss + row.tt);  // NaN if the other row is
    const T a = std::sqrt(row.ss), b = std::sqrt(row.tt), difference = (row.ss - row.tt) / (a + b);
    if (difference * difference > 2 * a * b) return 1 - row.st / a / b;
    const T square = row.dd - difference * difference;
    return square < 0 ? 0 : square / (2 * a * b);  // below 0 by rounding alone; NaN stays
  }
  ICSD_HD T value(const Row<T>& row) const { return scale * disagreement(row); }
  ICSD_HD void statistics(const Row<T>& row, T* out) const {
    out[0] = row.mean_s;
    out[1] = vanishes(row.ss, row.mean_s, row.count) ? 0 : 1 / std::sqrt(row.ss);
    out[2] = row.mean_t;
    out[3] = vanishes(row.tt, row.mean_t, row.count) ? 0 : 1 / std::sqrt(row.tt);
    out[4] = disagreement(row);
  }
  template <class V>
  static ICSD_HD V student_row(V s, V t, const V* row) {
    const V u = (s - row[0]) * row[1], v = (t - row[2]) * row[3];
    return row[1] * ((u - v) - row[4] * u);
  }
  template <class V>
  static ICSD_HD V teacher_row(V s, V t, const V* row) {
    const V u = (s - row[0]) * row[1], v = (t - row[2]) * row[3];
    return row[3] * ((v - u) - row[4] * v);
  }
  template <class V>
  ICSD_HD V student(V s, V t, const V* i, const V* j) const {
    return scale * (student_row(s, t, i) + student_row(s, t, j));
  }
  template <class V>
  ICSD_HD V teacher(V s, V t, const V* i, const V* j) const {
    return scale * (teacher_row(s, t, i) + teacher_row(s, t, j));
  }
};

// Names a loss to a generic function, which makes it with `typename decltype(tag)::template Of<T>`.
template <template <class> class D>
struct LossTag {
  template <class T>
  using Of = D<T>;
};

// Calls call(LossTag<D>{}) with the struct of a loss.
template <class Call>
auto with_loss(LossKind kind, const Call& call) {
  switch (kind) {
#define ICSD_LOSS(name, Loss) \
  case LossKind::name: return call(LossTag<Loss>{});
    ICSD_LOSSES(ICSD_LOSS)
#undef ICSD_LOSS
  }
  throw std::logic_error("LossKind has a value that no loss has");
}

inline const char* name_of(LossKind kind) {
  switch (kind) {
#define ICSD_LOSS(name, Loss) \
  case LossKind::name: return #name;
    ICSD_LOSSES(ICSD_LOSS)
#undef ICSD_LOSS
  }
  throw std::logic_error("LossKind has a value that no loss has");
}

}  // namespace icsd
