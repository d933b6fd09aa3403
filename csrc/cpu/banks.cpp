#include "cpu/banks.h"

#include "cpu/kernels/kernels.h"
#include "cpu/runtime/threads.h"

namespace icsd::cpu {
namespace {

constexpr std::int64_t kWorkOfExponent = 16;  // in multiply-adds

// Calls work(student, teacher, row) for each row of exponents.
template <class C, class Work>
void for_rows(const Exponents<C>& exponents, const Work& work) {
  in_parallel(threads_for(kWorkOfExponent * exponents.rows * exponents.columns), [&](Member member) {
    const Range range = split_of(exponents.rows, member.thread, member.threads);
    for (std::int64_t row = range.begin; row < range.end; ++row) {
      const std::int64_t first = row * exponents.columns;
      work(exponents.student + first, exponents.teacher + first, row);
    }
  });
}

}  // namespace

template <class C>
void add_exponentials(const Exponents<C>& exponents, BankRow<C>* rows, bool rising) {
  const auto& banks = kernels().template banks<C>();
  for_rows(exponents, [&](C* s, C* t, std::int64_t row) {  //
    banks.forward(s, t, exponents.columns, rising, rows + row);
  });
}

template <class C>
void exponent_gradients(const Exponents<C>& exponents, const BankRow<C>* rows, C student_factor, C teacher_factor) {
  const auto& banks = kernels().template banks<C>();
  for_rows(exponents, [&](C* s, C* t, std::int64_t row) {
    banks.backward(s, t, exponents.columns, rows[row], student_factor, teacher_factor);
  });
}

#define ICSD_INSTANTIATE(C)                                                  \
  template void add_exponentials<C>(const Exponents<C>&, BankRow<C>*, bool); \
  template void exponent_gradients<C>(const Exponents<C>&, const BankRow<C>*, C, C);
ICSD_INSTANTIATE(float)
ICSD_INSTANTIATE(double)
#undef ICSD_INSTANTIATE

}  // namespace icsd::cpu
