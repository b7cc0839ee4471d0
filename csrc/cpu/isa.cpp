#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace fastprune {
namespace {

Isa current = Isa::generic;

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "generic";
  }
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> supported = {Isa::generic};
#if FASTPRUNE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    supported.push_back(Isa::avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      supported.push_back(Isa::avx512);
  }
#endif
  return supported;
}

Isa isa() { return current; }

bool set_isa(const char* name) {
  for (Isa isa : supported_isas())
    if (!std::strcmp(name, isa_name(isa))) {
      current = isa;
      return true;
    }
  return false;
}

const char* init_isa() {
  const char* wanted = std::getenv("FASTPRUNE_CPU_ISA");
  if (!wanted || !*wanted) {
    current = supported_isas().back();
    return nullptr;
  }
  return set_isa(wanted) ? nullptr : wanted;
}

}  // namespace fastprune
