// The table of all kernels of one instruction set. Compiled once for each, with ICSD_ISA its namespace.
#include "cpu/kernels/kernels.h"

#define ICSD_STRING_(x) #x
#define ICSD_STRING(x) ICSD_STRING_(x)

namespace icsd::cpu::ICSD_ISA {

extern const GramKernel gram_kernels[kDTypes];
extern const CombineKernel combine_kernels[kDTypes];
extern const PackKernel<float> pack_float[kDTypes];
extern const PackKernel<double> pack_double[kDTypes];
extern const PutKernel<float> put_float;
extern const PutKernel<double> put_double;
extern const AllRowKernels<float> rows_float;
extern const AllRowKernels<double> rows_double;
extern const ProductKernels<float> products_float;
extern const ProductKernels<double> products_double;
extern const BankKernels<float> banks_float;
extern const BankKernels<double> banks_double;
#if defined(__AVX512BF16__)
extern const NarrowKernels narrow_kernels;
#endif

// A constant expression: code that filled the table while the module is loaded would run on processors that do not have
// its instructions.
extern constexpr Kernels kernels = {
    ICSD_STRING(ICSD_ISA), gram_kernels, combine_kernels, pack_float,       pack_double,  &put_float,    &put_double,
    &rows_float,           &rows_double, &products_float, &products_double, &banks_float, &banks_double,
#if defined(__AVX512BF16__)
    &narrow_kernels,
#else
    nullptr,
#endif
};

}  // namespace icsd::cpu::ICSD_ISA
