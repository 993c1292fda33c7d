/* The loops for AVX-512. */

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2")
#endif
#define TABLE loops_avx512
#define WIDTH 8
#include "loops.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
