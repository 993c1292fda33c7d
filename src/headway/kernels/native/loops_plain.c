/* The loops for the compiler's own baseline (SSE2 on x86-64, NEON on aarch64). */

#define TABLE loops_plain
#define WIDTH 2
#include "loops.h"
