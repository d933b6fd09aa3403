// Which build of the kernels this processor runs.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace icsd::cpu {
namespace {

#if defined(ICSD_X86)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

const Kernels& choose() {
  const char* variable = std::getenv("ICSD_CPU_ISA");
  const std::string wanted = variable ? variable : "";
  std::string available;
  const auto fits = [&](const Kernels& candidate) {
    available += std::string(available.empty() ? "" : ", ") + candidate.isa;
    return wanted.empty() || wanted == candidate.isa;
  };
#if defined(ICSD_X86)
  if (has_avx512bf16() && fits(avx512bf16::kernels)) return avx512bf16::kernels;
  if (has_avx512() && fits(avx512::kernels)) return avx512::kernels;
  if (has_avx2() && fits(avx2::kernels)) return avx2::kernels;
#endif
  if (fits(portable::kernels)) return portable::kernels;
  throw std::invalid_argument("ICSD_CPU_ISA is '" + wanted + "'; this processor runs " + available +
                              ": set one of these or unset it");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace icsd::cpu
