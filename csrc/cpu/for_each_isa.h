// Includes FASTPRUNE_FILE once for each instruction set, with FASTPRUNE_ISA its name and
// FASTPRUNE_VECTOR_BYTES its vectors' size. Not guarded: every op's file uses it. All headers must be
// included before: what is inside the pragmas is compiled for CPUs that this one need not be.

#define FASTPRUNE_ISA generic
#define FASTPRUNE_VECTOR_BYTES 16
#include FASTPRUNE_FILE
#undef FASTPRUNE_ISA
#undef FASTPRUNE_VECTOR_BYTES

#if FASTPRUNE_X86

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define FASTPRUNE_ISA avx2
#define FASTPRUNE_VECTOR_BYTES 32
#include FASTPRUNE_FILE
#undef FASTPRUNE_ISA
#undef FASTPRUNE_VECTOR_BYTES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define FASTPRUNE_ISA avx512
#define FASTPRUNE_VECTOR_BYTES 64
#include FASTPRUNE_FILE
#undef FASTPRUNE_ISA
#undef FASTPRUNE_VECTOR_BYTES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // FASTPRUNE_X86
