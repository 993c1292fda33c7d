/* Threads, chunks and the choice of the instruction set.

   The library has no threads of its own: it runs on the OpenMP pool that the process already has (PyTorch's), whose
   entry point GOMP_parallel is handed over at load time. A second pool would compete with the first. */

#include "headway.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

typedef void (*fork_join)(void (*)(void *), void *, unsigned threads, unsigned flags);

static fork_join pool;
static int (*thread_number)(void);
static pid_t owner;
static const loop_table *table = &loops_plain;

/* Changed together with any signature: a library left over from another version is refused. */
EXPORT int headway_version(void) { return 3; }

/* Hand over the pool, GOMP_parallel and omp_get_thread_num; NULL: run serially. */
EXPORT void headway_set_pool(fork_join entry, int (*number)(void)) {
    pool = entry;
    thread_number = number;
    owner = getpid();
}

/* Choose the instruction set: 0 plain C, 1 AVX2, 2 AVX-512. Returns the best one that is there up to `wanted`. */
EXPORT int headway_set_path(int wanted) {
    table = &loops_plain;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (wanted >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        table = &loops_avx512;
        return 2;
    }
    if (wanted >= 1 && __builtin_cpu_supports("avx2")) {
        table = &loops_avx2;
        return 1;
    }
#else
    (void)wanted;
#endif
    return 0;
}

const loop_table *loops(void) { return table; }

/* Each thread has a part of the range to itself, the same one in every pass over the same tensors, so that what it left
   in its cache is met again; a thread that is done helps the next ones. */
enum { PARTS = 256 };

typedef struct {
    _Alignas(64) atomic_size_t next;
    size_t end;
} part;

typedef struct {
    void (*work)(void *, size_t);
    void *argument;
    part *parts;
    int count;
} queue;

static void drain(void *pointer) {
    queue *q = pointer;
    int own = thread_number ? thread_number() : 0;
    for (int turn = 0; turn < q->count; turn++) {
        part *p = &q->parts[(own + turn) % q->count];
        size_t i;
        while ((i = atomic_fetch_add_explicit(&p->next, 1, memory_order_relaxed)) < p->end) q->work(q->argument, i);
    }
}

void parallel_for(size_t count, int threads, void (*work)(void *, size_t), void *argument) {
    /* OpenMP's threads do not survive a fork: a child that enters a parallel region would wait for them for ever. */
    if (count < 2 || threads < 2 || !pool || getpid() != owner) {
        for (size_t i = 0; i < count; i++) work(argument, i);
        return;
    }
    part parts[PARTS];
    const int used = threads < PARTS ? threads : PARTS;
    for (int i = 0; i < used; i++) {
        atomic_init(&parts[i].next, count * (size_t)i / (size_t)used);
        parts[i].end = count * (size_t)(i + 1) / (size_t)used;
    }
    queue q = {work, argument, parts, used};
    /* The whole team even for few chunks: a pool that changes size ends threads and starts them again. */
    pool(drain, &q, (unsigned)threads, 0);
}

int chunking_make(chunking *c, size_t length, size_t tensors, const size_t *sizes) {
    c->length = length;
    c->tensors = tensors;
    c->sizes = sizes;
    c->first = malloc((tensors + 1) * sizeof *c->first);
    if (!c->first) return 0;
    c->first[0] = 0;
    for (size_t t = 0; t < tensors; t++) c->first[t + 1] = c->first[t] + (sizes[t] + length - 1) / length;
    return 1;
}

void chunking_free(chunking *c) { free(c->first); }

size_t chunking_count(const chunking *c) { return c->first[c->tensors]; }

size_t chunking_find(const chunking *c, size_t chunk, size_t *start, size_t *end) {
    size_t low = 0, high = c->tensors; /* first[low] <= chunk < first[high] */
    while (high - low > 1) {
        size_t middle = (low + high) / 2;
        if (c->first[middle] <= chunk) low = middle;
        else high = middle;
    }
    *start = (chunk - c->first[low]) * c->length;
    *end = *start + c->length < c->sizes[low] ? *start + c->length : c->sizes[low];
    return low;
}
