#include "cpu/capability.h"

#include <cstdlib>
#include <cstring>

namespace csb::cpu {
namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const bool only_default = limit != nullptr && std::strcmp(limit, "default") == 0;
  const bool only_avx2 = limit != nullptr && std::strcmp(limit, "avx2") == 0;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && !only_default && !only_avx2) return kKernelsAvx512;
  if (avx2 && !only_default) return kKernelsAvx2;
#endif
  return kKernelsDefault;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* capability() { return kernels().name; }

}  // namespace csb::cpu
