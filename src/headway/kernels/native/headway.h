/* What the translation units of the library share.

   The inner loops (loops.h) are compiled once per instruction set and reached through a table of pointers; everything
   else (parallel.c and a file per kernel) is compiled once. No fused multiply-add is formed anywhere
   (-ffp-contract=off) and every sum has a fixed order, so all instruction sets and all numbers of threads give the
   same bits. */

#ifndef HEADWAY_H
#define HEADWAY_H

/* GCC moves 8-byte vectors through MMX registers now and then, without the EMMS that gives them back to the x87 unit:
   torch.remainder, among others, then returns NaN. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("no-mmx")
#endif

#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

/* Elements of a chunk, the unit of work that a thread takes: a fixed number, so that sums do not depend on threads. */
#define CHUNK ((size_t)1 << 15)

typedef struct {
    float lerp1; /* 1 - beta1 */
    float keep1; /* 1 - lerp1 */
    float beta2;
    float weight2; /* 1 - beta2 */
    float eps;
    float decay_before;
    float decay_after;
    float l2;
    float spike;
    float clip; /* infinity: none */
    float sign; /* -1 to maximize */
} adam_rule;

/* clip < 0: none */
adam_rule make_rule(double beta1, double beta2, double eps, double decay_before, double decay_after, double l2,
                    double spike, double clip, int maximize);

/* One tensor's arrays. `param` and `grad` are float or, with a 16-bit parameter, bfloat16. */
typedef struct {
    void *param;
    const void *grad;
    float *exp_avg;
    float *exp_avg_sq;
    float *previous;
    float step_size;
    float root_scale;
} adam_tensor;

/* How a gradient becomes orthogonal to its weight: g = scale (g - along w), in double where `close` (project.c). */
typedef struct {
    double along;
    double scale;
    int close;
} projection;

/* One step of the AdaGrad family (kernels/adagrad.py). */
typedef struct {
    float weight;
    float floor;
    float eps;
    float decay;
    float point_step;
    float x_step;
    float mix;
    float keep; /* 1 - mix */
} adagrad_rule;

/* One tensor's arrays; `sum` NULL: `inverse` holds for all entries; `x` NULL: one sequence. */
typedef struct {
    float *point;
    const float *grad;
    float *x;
    float *sum;
    float inverse;
} adagrad_tensor;

/* A map from 8-bit codes to numbers z in [-1, 1], and the way back: the code of z is the number of midpoints below it.
   With u = the bits of |z| less `least`, but at least 0 (1 for z > 0 and an unsigned map), and its complement within
   `range` for negative z, a cell is all u with the same bits above a shift, and holds one midpoint at most. The code is
   (cells[u >> shift] + u) >> shift: u carries into it exactly when z is past the cell's midpoint (blockwise.c). */
enum { SIGNED_SHIFT = 17, UNSIGNED_SHIFT = 16 };

typedef struct {
    const float *values; /* 256, ascending */
    const uint32_t *cells;
    uint32_t least; /* magnitudes up to here are below the first midpoint but 0 */
    uint32_t range; /* all ones; 0: an unsigned map, for which negative z are 0 */
} code_map;

/* Blocks of the 8-bit Adam step: their moments fit the first-level cache. */
#define BLOCK_LIMIT ((size_t)1 << 12)

typedef struct {
    void *param;
    const void *grad;
    uint8_t *codes1;
    float *absmax1;
    uint8_t *codes2;
    float *absmax2;
    const code_map *map1;
    const code_map *map2;
    float step_size;
    float root_scale;
} adam8_tensor;

typedef struct {
    void (*adam)(const adam_rule *, const adam_tensor *, int half, size_t start, size_t end);
    void (*adagrad)(const adagrad_rule *, const adagrad_tensor *, size_t start, size_t end);
    int (*nonfinite_float)(const uint32_t *, size_t);
    int (*nonfinite_bfloat16)(const uint16_t *, size_t);
    /* Of CHUNK magnitudes at most, as integers: how many are > high; those in [low, high] go to `inside`, `*found` is
       their number, and `*largest` the largest of all. */
    size_t (*bracket)(const uint32_t *, size_t, uint32_t low, uint32_t high, uint32_t *inside, size_t *found,
                      uint32_t *largest);
    void (*clamp)(float *, size_t, float bound);
    /* w.g, w.w and g.g; of products rounded to float, or of exact ones */
    void (*dots)(const float *g, const float *w, size_t, double sums[3]);
    void (*dots_double)(const float *g, const float *w, size_t, double sums[3]);
    /* |g|^2, in the same two ways */
    double (*squares)(const float *g, size_t);
    double (*squares_double)(const float *g, size_t);
    /* |g - along w|^2 */
    double (*residual)(const float *g, const float *w, size_t, double along);
    /* g = scale (g - along w), in float or double arithmetic */
    void (*project)(float *g, const float *w, size_t, double along, double scale);
    void (*project_double)(float *g, const float *w, size_t, double along, double scale);
    /* A block: codes and largest magnitude of `count` numbers, and back. */
    float (*quantize)(const code_map *, const float *, size_t count, uint8_t *codes);
    void (*dequantize)(const code_map *, const uint8_t *codes, float absmax, size_t count, float *);
    void (*adam8)(const adam_rule *, const adam8_tensor *, int half, size_t start, size_t end, size_t block_size);
} loop_table;

extern const loop_table loops_plain;
#if defined(__x86_64__)
extern const loop_table loops_avx2;
extern const loop_table loops_avx512;
#endif

/* The table of the instruction set in use. */
const loop_table *loops(void);

/* work(argument, i) for all 0 <= i < count, on up to `threads` threads. */
void parallel_for(size_t count, int threads, void (*work)(void *, size_t), void *argument);

/* Tensors cut into chunks of `length` elements that are numbered through. */
typedef struct {
    size_t length;
    size_t tensors;
    const size_t *sizes;
    size_t *first; /* first[t] is the number of tensor t's first chunk; one entry more than tensors */
} chunking;

int chunking_make(chunking *, size_t length, size_t tensors, const size_t *sizes);
void chunking_free(chunking *);
size_t chunking_count(const chunking *);
/* Tensor, and the range of its elements, of a chunk. */
size_t chunking_find(const chunking *, size_t chunk, size_t *start, size_t *end);

#endif
