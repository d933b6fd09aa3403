// Chooses the build of the kernels for this processor.
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/kernels/kernels.h"

namespace icsd::cpu {
namespace {

#if defined(ICSD_X86)
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// Linux lets a process use tile registers only after it has asked for them.
[[maybe_unused]] bool has_amx() {
#if defined(__linux__)
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return has_avx512bf16() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const Kernels& choose() {
  const char* variable = std::getenv("ICSD_CPU_ISA");
  const std::string wanted = variable ? variable : "";
  std::string available;
  const auto fits = [&](const Kernels& candidate) {
    available += std::string(available.empty() ? "" : ", ") + candidate.isa;
    return wanted.empty() || wanted == candidate.isa;
  };
#if defined(ICSD_HAS_AMX)
  if (has_amx() && fits(amx::kernels)) return amx::kernels;
#endif
#if defined(ICSD_HAS_AVX512BF16)
  if (has_avx512bf16() && fits(avx512bf16::kernels)) return avx512bf16::kernels;
#endif
#if defined(ICSD_HAS_AVX512)
  if (has_avx512() && fits(avx512::kernels)) return avx512::kernels;
#endif
#if defined(ICSD_HAS_AVX2)
  if (has_avx2() && fits(avx2::kernels)) return avx2::kernels;
#endif
#if defined(ICSD_HAS_PORTABLE)
  if (fits(portable::kernels)) return portable::kernels;
#endif
  if (available.empty()) {
    throw std::invalid_argument("icsd was built with ICSD_CPU_ISAS for other processors: build it again without that");
  }
  throw std::invalid_argument("ICSD_CPU_ISA is '" + wanted + "'; this processor runs " + available +
                              ": set one of these or unset it");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace icsd::cpu
