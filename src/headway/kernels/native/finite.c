/* Which of a list of tensors is the first that holds a NaN or an infinity. */

#include "headway.h"

#include <stdatomic.h>

typedef struct {
    chunking chunks;
    void *const *tensors;
    const int *half;
    atomic_size_t first;
} job;

static void work(void *pointer, size_t chunk) {
    job *j = pointer;
    size_t start, end, t = chunking_find(&j->chunks, chunk, &start, &end);
    size_t first = atomic_load_explicit(&j->first, memory_order_relaxed);
    if (t >= first) return;
    int bad = j->half[t] ? loops()->nonfinite_bfloat16((const uint16_t *)j->tensors[t] + start, end - start)
                         : loops()->nonfinite_float((const uint32_t *)j->tensors[t] + start, end - start);
    while (bad && t < first && !atomic_compare_exchange_weak(&j->first, &first, t)) {
    }
}

/* `half[t]`: tensor t is bfloat16, not float. Sets `first` to the index, or to `tensors` if all are finite. Returns 0
   if memory ran out. */
EXPORT int headway_first_nonfinite(size_t tensors, const size_t *sizes, const int *half, void *const *pointers,
                                   size_t *first, int threads) {
    job j = {.tensors = pointers, .half = half, .first = tensors};
    if (!chunking_make(&j.chunks, CHUNK, tensors, sizes)) return 0;
    parallel_for(chunking_count(&j.chunks), threads, work, &j);
    chunking_free(&j.chunks);
    *first = j.first;
    return 1;
}
