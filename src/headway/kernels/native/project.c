/* Gradients made orthogonal to their weights; see kernels/project.py for the rule. */

#include "headway.h"

#include <math.h>
#include <stdlib.h>

/* Tensors are taken in groups of about so many elements per thread, so that the second pass over a group finds it in
   the cache. */
#define GROUP ((size_t)1 << 18)

/* |g_perp| below this fraction of |g| is rounding noise. */
#define PARALLEL 1e-6

/* What float arithmetic leaves along w, at most 6e-7 |g|, and its error of |g_perp| matter more the smaller |g_perp|:
   below this fraction of |g|^2 for |g_perp|^2, two more passes and the projection are in double. */
#define CLOSE 0.1
#define TINY 1e-20

typedef struct {
    chunking chunks;
    size_t first_chunk; /* of the group */
    void *const *grads;
    void *const *weights;
    double (*sums)[3];    /* of a chunk */
    projection *decisions; /* of a tensor */
} job;

typedef struct {
    size_t chunk;
    float *g;
    const float *w;
    size_t count;
    projection *decision;
} piece;

static piece find(const job *j, size_t i) {
    size_t start, end, chunk = j->first_chunk + i, t = chunking_find(&j->chunks, chunk, &start, &end);
    return (piece){chunk, (float *)j->grads[t] + start, (const float *)j->weights[t] + start, end - start,
                   j->decisions + t};
}

static void sum(void *pointer, size_t i) {
    job *j = pointer;
    piece p = find(j, i);
    loops()->dots(p.g, p.w, p.count, j->sums[p.chunk]);
}

static void sum_close(void *pointer, size_t i) {
    job *j = pointer;
    piece p = find(j, i);
    if (p.decision->close) loops()->dots_double(p.g, p.w, p.count, j->sums[p.chunk]);
}

static void measure_close(void *pointer, size_t i) {
    job *j = pointer;
    piece p = find(j, i);
    if (p.decision->close) j->sums[p.chunk][0] = loops()->residual(p.g, p.w, p.count, p.decision->along);
}

static void apply(void *pointer, size_t i) {
    job *j = pointer;
    piece p = find(j, i);
    const projection *d = p.decision;
    (d->close ? loops()->project_double : loops()->project)(p.g, p.w, p.count, d->along, d->scale);
}

/* A tensor's sum number n, its chunks in order. */
static double total(const job *j, size_t t, int n) {
    double sum = 0;
    for (size_t chunk = j->chunks.first[t]; chunk < j->chunks.first[t + 1]; chunk++) sum += j->sums[chunk][n];
    return sum;
}

static double scale_of(double rest, double norm, int renormalize) {
    if (rest < PARALLEL * norm) return 0;
    return renormalize ? norm / (rest + 1e-30) : 1;
}

/* Fill in the projections of tensors t to end - 1. */
static void decide(job *j, size_t t, size_t end, int renormalize, int threads) {
    int any = 0;
    j->first_chunk = j->chunks.first[t];
    const size_t chunks = j->chunks.first[end] - j->first_chunk;
    parallel_for(chunks, threads, sum, j);
    for (size_t u = t; u < end; u++) {
        const double wg = total(j, u, 0), ww = total(j, u, 1), gg = total(j, u, 2), along = wg / (ww + 1e-30);
        const double rest = gg - along * (2 * wg - along * ww);
        /* Sums that overflowed, and sums so small that products have underflowed, call for double too. */
        const int close = !(rest >= CLOSE * gg && gg >= TINY && ww >= TINY && gg + ww < INFINITY);
        j->decisions[u] = (projection){along, close ? 0 : scale_of(sqrt(rest), sqrt(gg), renormalize), close};
        any |= close;
    }
    if (!any) return;
    parallel_for(chunks, threads, sum_close, j);
    for (size_t u = t; u < end; u++)
        if (j->decisions[u].close) j->decisions[u].along = total(j, u, 0) / (total(j, u, 1) + 1e-30);
    parallel_for(chunks, threads, measure_close, j);
    for (size_t u = t; u < end; u++)
        if (j->decisions[u].close)
            j->decisions[u].scale = scale_of(sqrt(total(j, u, 0)), sqrt(total(j, u, 2)), renormalize);
}

/* The projections of all gradients, which are only read. Returns 0 if memory ran out. */
EXPORT int headway_projections(size_t tensors, const size_t *sizes, void *const *grads, void *const *weights,
                               projection *projections, int renormalize, int threads) {
    job j = {.grads = grads, .weights = weights, .decisions = projections};
    if (!chunking_make(&j.chunks, CHUNK, tensors, sizes)) return 0;
    j.sums = malloc((chunking_count(&j.chunks) + 1) * sizeof *j.sums);
    if (j.sums) decide(&j, 0, tensors, renormalize, threads);
    const int done = j.sums != NULL;
    free(j.sums);
    chunking_free(&j.chunks);
    return done;
}

/* The projected gradients, in place. Returns 0 if memory ran out (nothing is changed then). */
EXPORT int headway_project(size_t tensors, const size_t *sizes, void *const *grads, void *const *weights,
                           int renormalize, int threads) {
    job j = {.grads = grads, .weights = weights};
    if (!chunking_make(&j.chunks, CHUNK, tensors, sizes)) return 0;
    j.sums = malloc((chunking_count(&j.chunks) + 1) * sizeof *j.sums);
    j.decisions = malloc((tensors + 1) * sizeof *j.decisions);
    int done = j.sums && j.decisions;
    for (size_t t = 0, end; done && t < tensors; t = end) {
        size_t elements = 0;
        for (end = t; end < tensors && (end == t || elements + sizes[end] <= GROUP * (size_t)threads); end++)
            elements += sizes[end];
        decide(&j, t, end, renormalize, threads);
        parallel_for(j.chunks.first[end] - j.first_chunk, threads, apply, &j);
    }
    free(j.decisions);
    free(j.sums);
    chunking_free(&j.chunks);
    return done;
}
