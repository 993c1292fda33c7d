/* Gradients made orthogonal to their weights; see kernels/project.py for the rule. */

#include "headway.h"

#include <math.h>
#include <stdlib.h>

/* Tensors are taken in groups of about so many elements per thread, so that the second pass over a group finds it in
   the cache. */
#define GROUP ((size_t)1 << 18)

#define PARALLEL 1e-6

typedef struct {
    double along;
    double scale;
    int exact; /* g and w are nearly parallel: float arithmetic, or |g|^2 - (w.g)^2 / w.w even in double, cancels */
    int measure;
} decision;

typedef struct {
    chunking chunks;
    size_t first_chunk; /* of the group */
    size_t last_chunk;
    void *const *grads;
    void *const *weights;
    double (*sums)[3]; /* of a chunk */
    decision *decisions; /* of a tensor */
} job;

static void find(const job *j, size_t chunk, size_t *t, float **g, const float **w, size_t *count) {
    size_t start, end;
    *t = chunking_find(&j->chunks, chunk, &start, &end);
    *g = (float *)j->grads[*t] + start;
    *w = (const float *)j->weights[*t] + start;
    *count = end - start;
}

static void sum(void *pointer, size_t i) {
    job *j = pointer;
    size_t t, count, chunk = j->first_chunk + i;
    float *g;
    const float *w;
    find(j, chunk, &t, &g, &w, &count);
    loops()->dots(g, w, count, j->sums[chunk]);
}

static void measure(void *pointer, size_t i) {
    job *j = pointer;
    size_t t, count, chunk = j->first_chunk + i;
    float *g;
    const float *w;
    find(j, chunk, &t, &g, &w, &count);
    if (j->decisions[t].measure) j->sums[chunk][0] = loops()->residual(g, w, count, j->decisions[t].along);
}

/* From the last chunk to the first: the end of a tensor too large for the cache is still in it. */
static void apply(void *pointer, size_t i) {
    job *j = pointer;
    size_t t, count;
    float *g;
    const float *w;
    find(j, j->first_chunk + i, &t, &g, &w, &count);
    const decision d = j->decisions[t];
    (d.exact ? loops()->project_double : loops()->project)(g, w, count, d.along, d.scale);
}

static double scale_of(double rest, double norm, int renormalize) {
    if (rest < PARALLEL * norm) return 0;
    return renormalize ? norm / (rest + 1e-30) : 1;
}

/* Returns 0 if memory ran out (nothing is changed then). */
EXPORT int headway_project(size_t tensors, const size_t *sizes, void *const *grads, void *const *weights,
                           int renormalize, int threads) {
    job j = {.grads = grads, .weights = weights};
    if (!chunking_make(&j.chunks, tensors, sizes)) return 0;
    const size_t *first = j.chunks.first;
    j.sums = malloc((chunking_count(&j.chunks) + 1) * sizeof *j.sums);
    j.decisions = malloc((tensors + 1) * sizeof *j.decisions);
    int done = j.sums && j.decisions;
    for (size_t t = 0, end; done && t < tensors; t = end) {
        size_t elements = 0;
        for (end = t; end < tensors && (end == t || elements + sizes[end] <= GROUP * (size_t)threads); end++)
            elements += sizes[end];
        j.first_chunk = first[t];
        j.last_chunk = first[end];
        const size_t chunks = j.last_chunk - j.first_chunk;
        parallel_for(chunks, threads, sum, &j);
        int any = 0;
        for (size_t u = t; u < end; u++) {
            double wg = 0, ww = 0, gg = 0;
            for (size_t chunk = first[u]; chunk < first[u + 1]; chunk++) {
                wg += j.sums[chunk][0];
                ww += j.sums[chunk][1];
                gg += j.sums[chunk][2];
            }
            double along = wg / (ww + 1e-30), rest = gg - along * (2 * wg - along * ww);
            decision d = {along, scale_of(sqrt(rest > 0 ? rest : 0), sqrt(gg), renormalize), rest < 1e-2 * gg, rest < 1e-6 * gg};
            any |= d.measure;
            j.decisions[u] = d;
        }
        if (any) {
            /* sums[.][2] stays: |g|^2 of the chunk */
            parallel_for(chunks, threads, measure, &j);
            for (size_t u = t; u < end; u++) {
                if (!j.decisions[u].measure) continue;
                double rest = 0, gg = 0;
                for (size_t chunk = first[u]; chunk < first[u + 1]; chunk++) {
                    rest += j.sums[chunk][0];
                    gg += j.sums[chunk][2];
                }
                j.decisions[u].scale = scale_of(sqrt(rest), sqrt(gg), renormalize);
            }
        }
        parallel_for(chunks, threads, apply, &j);
    }
    free(j.decisions);
    free(j.sums);
    chunking_free(&j.chunks);
    return done;
}
