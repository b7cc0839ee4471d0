// Instruction sets, chosen at run time.
//
// An op's .cpp file is written in two halves. Its kernels stand under `#ifdef FASTPRUNE_ISA` in the namespace
// fastprune::FASTPRUNE_ISA, and are compiled once for each instruction set by for_each_isa.h; the rest of the
// file checks arguments and calls them through FASTPRUNE_DISPATCH.
#pragma once

#include <vector>

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define FASTPRUNE_X86 1
#else
#define FASTPRUNE_X86 0
#endif

namespace fastprune {

enum class Isa { generic, avx2, avx512 };

Isa isa();
bool set_isa(const char* name);  // false if this build or this CPU does not have it
const char* init_isa();          // reads FASTPRUNE_CPU_ISA; its value if it is not to be had, else null
const char* isa_name(Isa isa);
std::vector<Isa> supported_isas();  // slowest first

}  // namespace fastprune

#if FASTPRUNE_X86
#define FASTPRUNE_DISPATCH(function, ...)                                                      \
  (::fastprune::isa() == ::fastprune::Isa::avx512 ? ::fastprune::avx512::function(__VA_ARGS__) \
   : ::fastprune::isa() == ::fastprune::Isa::avx2 ? ::fastprune::avx2::function(__VA_ARGS__)   \
                                                  : ::fastprune::generic::function(__VA_ARGS__))
#else
#define FASTPRUNE_DISPATCH(function, ...) ::fastprune::generic::function(__VA_ARGS__)
#endif
