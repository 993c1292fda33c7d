/* The k-th largest magnitude over a list of tensors, exactly, and clamping to a magnitude.

   Magnitudes are compared as integers, the bits without the sign. A sample gives a bracket [low, high] that holds the
   answer but for bad luck; one pass counts what is above it and collects what is inside; selection among
   those is exact. With bad luck, or so many equal values that the collection has no room, histogram passes over all
   elements narrow the interval until one value is left. */

#include "headway.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { BINS = 2048, SAMPLE = 1 << 16 };

/* NaN counts as larger than infinity. */
#define LARGEST 0x7fffffffu

typedef struct {
    uint32_t low, high;
    size_t k; /* the wanted element is the k-th largest of those in [low, high] */
} interval;

typedef struct {
    chunking chunks;
    void *const *tensors;
    interval within;
    unsigned shift;
    atomic_size_t above;
    atomic_size_t inside;
    _Atomic uint32_t largest;
    atomic_size_t histogram[BINS];
    uint32_t *collected;
    size_t capacity;
} job;

static unsigned shift_of(interval within) {
    unsigned shift = 0;
    while ((within.high - within.low) >> shift >= BINS) shift++;
    return shift;
}

/* The part of the interval that bin `bin` stands for, `larger` elements being in the bins above it. */
static interval narrowed(interval within, unsigned shift, size_t bin, size_t larger) {
    uint32_t low = within.low + ((uint32_t)bin << shift);
    uint32_t high = low + ((1u << shift) - 1);
    return (interval){low, high < within.high ? high : within.high, within.k - larger};
}

/* Selection among `count` keys in memory, all of which lie in the interval; the keys are moved. */
static uint32_t select_key(uint32_t *keys, size_t count, interval within) {
    size_t histogram[BINS];
    while (within.low < within.high) {
        const unsigned shift = shift_of(within);
        memset(histogram, 0, sizeof histogram);
        for (size_t i = 0; i < count; i++) histogram[(keys[i] - within.low) >> shift]++;
        size_t bin = BINS - 1, larger = 0;
        while (larger + histogram[bin] < within.k) larger += histogram[bin--];
        within = narrowed(within, shift, bin, larger);
        size_t kept = 0;
        for (size_t i = 0; i < count; i++) {
            uint32_t key = keys[i];
            keys[kept] = key;
            kept += key - within.low <= within.high - within.low;
        }
        count = kept;
    }
    return within.low;
}

static void collect(void *pointer, size_t chunk) {
    job *j = pointer;
    uint32_t inside[CHUNK];
    size_t start, end, found, t = chunking_find(&j->chunks, chunk, &start, &end);
    const uint32_t *bits = (const uint32_t *)j->tensors[t] + start;
    uint32_t largest, known = atomic_load_explicit(&j->largest, memory_order_relaxed);
    size_t above = loops()->bracket(bits, end - start, j->within.low, j->within.high, inside, &found, &largest);
    while (largest > known && !atomic_compare_exchange_weak(&j->largest, &known, largest)) {
    }
    atomic_fetch_add_explicit(&j->above, above, memory_order_relaxed);
    size_t place = atomic_fetch_add_explicit(&j->inside, found, memory_order_relaxed);
    if (place < j->capacity && found <= j->capacity - place)
        memcpy(j->collected + place, inside, found * sizeof *inside);
}

static void tally(void *pointer, size_t chunk) {
    job *j = pointer;
    uint32_t histogram[BINS] = {0};
    size_t start, end, t = chunking_find(&j->chunks, chunk, &start, &end);
    const uint32_t *bits = j->tensors[t], width = j->within.high - j->within.low;
    for (size_t i = start; i < end; i++) {
        uint32_t offset = (bits[i] & 0x7fffffff) - j->within.low;
        if (offset <= width) histogram[offset >> j->shift]++;
    }
    for (size_t bin = 0; bin < BINS; bin++)
        if (histogram[bin]) atomic_fetch_add_explicit(&j->histogram[bin], histogram[bin], memory_order_relaxed);
}

static uint32_t select_by_histograms(job *j, int threads) {
    while (j->within.low < j->within.high) {
        j->shift = shift_of(j->within);
        for (size_t bin = 0; bin < BINS; bin++) j->histogram[bin] = 0;
        parallel_for(chunking_count(&j->chunks), threads, tally, j);
        size_t bin = BINS - 1, larger = 0;
        while (larger + j->histogram[bin] < j->within.k) larger += j->histogram[bin--];
        j->within = narrowed(j->within, j->shift, bin, larger);
    }
    return j->within.low;
}

/* Every element's magnitude if there are few, else one of each of SAMPLE equal parts, at a place that changes from
   part to part: a fixed stride could always meet the same column. */
static size_t draw_sample(const job *j, size_t total, uint32_t *sample) {
    const size_t count = total < SAMPLE ? total : SAMPLE;
    size_t t = 0, first = 0; /* tensor t starts at element `first` of the list */
    for (size_t i = 0; i < count; i++) {
        size_t start = (size_t)((double)total / count * i), end = (size_t)((double)total / count * (i + 1));
        size_t place = start;
        if (end > start + 1) place += (size_t)(((uint64_t)(uint32_t)(i * 2654435761u) * (end - start)) >> 32);
        if (total == count) place = i;
        while (place - first >= j->chunks.sizes[t]) first += j->chunks.sizes[t++];
        sample[i] = ((const uint32_t *)j->tensors[t])[place - first] & 0x7fffffff;
    }
    return count;
}

/* Sets `magnitudes` to the k-th largest |x| of all elements, 1 <= k <= number of elements, and to the largest. Returns
   0 if memory ran out. */
EXPORT int headway_kth_largest(size_t tensors, const size_t *sizes, void *const *pointers, size_t k,
                               float magnitudes[2], int threads) {
    size_t total = 0;
    for (size_t t = 0; t < tensors; t++) total += sizes[t];
    job *j = calloc(1, sizeof *j);
    if (!j) return 0;
    j->tensors = pointers;
    j->capacity = total / 32 + 2 * SAMPLE;
    j->collected = malloc(j->capacity * sizeof *j->collected);
    int made = chunking_make(&j->chunks, CHUNK, tensors, sizes);
    if (made && j->collected) {
        const interval everything = {0, LARGEST, k};
        const size_t count = draw_sample(j, total, j->collected);
        uint32_t key;
        if (count == total) {
            for (size_t i = 0; i < count; i++)
                if (j->collected[i] > j->largest) j->largest = j->collected[i];
            key = select_key(j->collected, count, everything);
        } else {
            /* The rank in the sample, and four standard deviations of it to either side. */
            const double rank = (double)k / total * count;
            const double margin = 4 * sqrt(rank * (1 - (double)k / total)) + 5;
            const size_t upper = rank > margin + 1 ? (size_t)(rank - margin) : 0, lower = (size_t)(rank + margin) + 1;
            j->within = everything;
            uint32_t *copy = memcpy(j->collected + count, j->collected, count * sizeof *copy);
            if (upper) j->within.high = select_key(j->collected, count, (interval){0, LARGEST, upper});
            if (lower <= count) j->within.low = select_key(copy, count, (interval){0, LARGEST, lower});
            parallel_for(chunking_count(&j->chunks), threads, collect, j);
            const size_t above = j->above, inside = j->inside;
            if (k <= above) {
                j->within = (interval){j->within.high + 1, LARGEST, k};
                key = select_by_histograms(j, threads);
            } else if (k > above + inside) {
                j->within = (interval){0, j->within.low - 1, k - above - inside};
                key = select_by_histograms(j, threads);
            } else {
                j->within.k = k - above;
                key = inside <= j->capacity ? select_key(j->collected, inside, j->within)
                                            : select_by_histograms(j, threads);
            }
        }
        const uint32_t keys[2] = {key, j->largest};
        memcpy(magnitudes, keys, sizeof keys);
    }
    int done = made && j->collected;
    if (made) chunking_free(&j->chunks);
    free(j->collected);
    free(j);
    return done;
}

typedef struct {
    chunking chunks;
    void *const *tensors;
    float bound;
} clamp_job;

static void clamp(void *pointer, size_t chunk) {
    const clamp_job *j = pointer;
    size_t start, end, t = chunking_find(&j->chunks, chunk, &start, &end);
    loops()->clamp((float *)j->tensors[t] + start, end - start, j->bound);
}

/* Returns 0 if memory ran out. */
EXPORT int headway_clamp(size_t tensors, const size_t *sizes, void *const *pointers, double bound, int threads) {
    clamp_job j = {.tensors = pointers, .bound = (float)bound};
    if (!chunking_make(&j.chunks, CHUNK, tensors, sizes)) return 0;
    parallel_for(chunking_count(&j.chunks), threads, clamp, &j);
    chunking_free(&j.chunks);
    return 1;
}
