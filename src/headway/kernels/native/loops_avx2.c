/* The loops for AVX2. */

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define TABLE loops_avx2
#define WIDTH 4
#include "loops.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
