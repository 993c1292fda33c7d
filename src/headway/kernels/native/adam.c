/* One step of the Adam family over a list of tensors; see kernels/adam.py for the rule. */

#include "headway.h"

#include <math.h>

typedef struct {
    chunking chunks;
    adam_rule rule;
    int half;
    void *const *params;
    void *const *grads;
    void *const *exp_avgs;
    void *const *exp_avg_sqs;
    void *const *previous;
    const float *step_sizes;
    const float *root_scales;
    const projection *projections;
    const float *bounds;
} job;

static void work(void *pointer, size_t chunk) {
    const job *j = pointer;
    size_t start, end, t = chunking_find(&j->chunks, chunk, &start, &end);
    adam_tensor tensor = {
        j->params[t],     j->grads[t],       j->exp_avgs[t], j->exp_avg_sqs[t], j->previous ? j->previous[t] : NULL,
        j->step_sizes[t], j->root_scales[t],
    };
    /* A chunk of gradients that was changed is still in the cache for the step. */
    if (j->projections && (j->projections[t].along != 0 || j->projections[t].scale != 1)) {
        const projection own = j->projections[t];
        (own.close ? loops()->project_double : loops()->project)(
            (float *)j->grads[t] + start, (const float *)j->params[t] + start, end - start, own.along, own.scale);
    }
    if (j->bounds) loops()->clamp((float *)j->grads[t] + start, end - start, j->bounds[t]);
    loops()->adam(&j->rule, &tensor, j->half, start, end);
}

adam_rule make_rule(double beta1, double beta2, double eps, double decay_before, double decay_after, double l2,
                    double spike, double clip, int maximize) {
    const float lerp1 = (float)(1 - beta1);
    return (adam_rule){
        .lerp1 = lerp1,
        .keep1 = 1.0f - lerp1,
        .beta2 = (float)beta2,
        .weight2 = (float)(1 - beta2),
        .eps = (float)eps,
        .decay_before = (float)decay_before,
        .decay_after = (float)decay_after,
        .l2 = (float)l2,
        .spike = (float)spike,
        .clip = clip < 0 ? INFINITY : (float)clip,
        .sign = maximize ? -1.0f : 1.0f,
    };
}

/* `previous`, and `projections` and `bounds` of float gradients, may be NULL; clip < 0: none. Returns 0 if memory ran
   out (nothing is changed then). */
EXPORT int headway_adam(size_t tensors, const size_t *sizes, int half, void *const *params, void *const *grads,
                        void *const *exp_avgs, void *const *exp_avg_sqs, void *const *previous, const float *step_sizes,
                        const float *root_scales, const projection *projections, const float *bounds, double beta1,
                        double beta2, double eps, double decay_before, double decay_after, double l2, double spike,
                        double clip, int maximize, int threads) {
    job j = {
        .rule = make_rule(beta1, beta2, eps, decay_before, decay_after, l2, spike, clip, maximize),
        .half = half,
        .params = params,
        .grads = grads,
        .exp_avgs = exp_avgs,
        .exp_avg_sqs = exp_avg_sqs,
        .previous = previous,
        .step_sizes = step_sizes,
        .root_scales = root_scales,
        .projections = projections,
        .bounds = bounds,
    };
    if (!chunking_make(&j.chunks, CHUNK, tensors, sizes)) return 0;
    parallel_for(chunking_count(&j.chunks), threads, work, &j);
    chunking_free(&j.chunks);
    return 1;
}
