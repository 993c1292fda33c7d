/* One step of the AdaGrad family over a list of tensors; see kernels/adagrad.py for the rule. */

#include "headway.h"

typedef struct {
    chunking chunks;
    adagrad_rule rule;
    void *const *points;
    void *const *grads;
    void *const *xs;
    void *const *sums;
    const double *inverses;
} job;

static void work(void *pointer, size_t chunk) {
    const job *j = pointer;
    size_t start, end, t = chunking_find(&j->chunks, chunk, &start, &end);
    adagrad_tensor tensor = {
        j->points[t], j->grads[t], j->xs ? j->xs[t] : NULL, j->sums ? j->sums[t] : NULL,
        j->sums ? 0 : (float)j->inverses[t],
    };
    loops()->adagrad(&j->rule, &tensor, start, end);
}

/* `xs` may be NULL; with `sums` there are no `inverses`. Returns 0 if memory ran out (nothing is changed then). */
EXPORT int headway_adagrad(size_t tensors, const size_t *sizes, void *const *points, void *const *grads,
                           void *const *xs, void *const *sums, const double *inverses, double weight, double floor,
                           double eps, double decay, double point_step, double x_step, double mix, int threads) {
    job j = {
        .rule = {(float)weight, (float)floor, (float)eps, (float)decay, (float)point_step, (float)x_step, (float)mix,
                 1.0f - (float)mix},
        .points = points,
        .grads = grads,
        .xs = xs,
        .sums = sums,
        .inverses = inverses,
    };
    if (!chunking_make(&j.chunks, CHUNK, tensors, sizes)) return 0;
    parallel_for(chunking_count(&j.chunks), threads, work, &j);
    chunking_free(&j.chunks);
    return 1;
}
