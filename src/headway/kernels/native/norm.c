/* The squared norms of a list of tensors. */

#include "headway.h"

#include <math.h>
#include <stdlib.h>

/* Below it squares may have underflowed. */
#define TINY 1e-20

typedef struct {
    chunking chunks;
    void *const *tensors;
    double *norms; /* of a tensor */
    double *sums;  /* of a chunk */
} job;

static int unsure(double norm) { return !(norm >= TINY && norm < INFINITY); }

static void sum(void *pointer, size_t chunk) {
    job *j = pointer;
    size_t start, end, t = chunking_find(&j->chunks, chunk, &start, &end);
    j->sums[chunk] = loops()->squares((const float *)j->tensors[t] + start, end - start);
}

static void sum_unsure(void *pointer, size_t chunk) {
    job *j = pointer;
    size_t start, end, t = chunking_find(&j->chunks, chunk, &start, &end);
    if (unsure(j->norms[t]))
        j->sums[chunk] = loops()->squares_double((const float *)j->tensors[t] + start, end - start);
}

/* Returns whether a norm is unsure. */
static int add_up(job *j) {
    int any = 0;
    for (size_t t = 0; t < j->chunks.tensors; t++) {
        j->norms[t] = 0;
        for (size_t chunk = j->chunks.first[t]; chunk < j->chunks.first[t + 1]; chunk++) j->norms[t] += j->sums[chunk];
        any |= unsure(j->norms[t]);
    }
    return any;
}

/* Sets norms[t] to |x|^2, which is finite exactly if tensor t is. Returns 0 if memory ran out. */
EXPORT int headway_squared_norms(size_t tensors, const size_t *sizes, void *const *pointers, double *norms,
                                 int threads) {
    job j = {.tensors = pointers, .norms = norms};
    if (!chunking_make(&j.chunks, CHUNK, tensors, sizes)) return 0;
    const size_t chunks = chunking_count(&j.chunks);
    j.sums = malloc((chunks + 1) * sizeof *j.sums);
    if (j.sums) {
        parallel_for(chunks, threads, sum, &j);
        if (add_up(&j)) {
            parallel_for(chunks, threads, sum_unsure, &j);
            add_up(&j);
        }
    }
    const int done = j.sums != NULL;
    free(j.sums);
    chunking_free(&j.chunks);
    return done;
}
