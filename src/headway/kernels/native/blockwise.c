/* Block-wise 8-bit codes of tensors, and one step of the Adam family on 8-bit moments; see kernels/blockwise.py. */

#include "headway.h"

#include <math.h>
#include <string.h>

enum { CELLS = 1 << 12 };

static float values[2][256];
static uint32_t cells[2][CELLS];
static code_map maps[2]; /* unsigned, signed */

static uint32_t magnitude_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffff;
}

/* Take over a map: 256 values and 255 midpoints ascending, values[255] = 1; an unsigned map has no z < 0 and may have a
   midpoint at 0. Returns 0 if the cells cannot express it. */
EXPORT int headway_set_map(int is_signed, const float *own_values, const float *midpoints) {
    code_map *map = &maps[is_signed];
    const uint32_t shift = is_signed ? SIGNED_SHIFT : UNSIGNED_SHIFT, mask = (1u << shift) - 1;
    uint32_t *own_cells = cells[is_signed], smallest = magnitude_bits(1.0f);
    for (int i = 0; i < 255; i++)
        if (midpoints[i] != 0 && magnitude_bits(midpoints[i]) < smallest) smallest = magnitude_bits(midpoints[i]);
    memcpy(values[is_signed], own_values, sizeof values[is_signed]);
    map->values = values[is_signed];
    map->cells = own_cells;
    map->least = ((smallest >> shift) - 1) << shift; /* so the first cell holds no midpoint */
    map->range = is_signed ? ((uint32_t)CELLS << shift) - 1 : 0;
    if ((magnitude_bits(1.0f) - map->least) >> shift >= (is_signed ? CELLS / 2 : CELLS)) return 0;
    for (uint32_t index = 0; index < CELLS; index++) {
        /* Going up in z, which within a cell is up in u: `base` midpoints are below the cell, and z is past the cell's
           own after more than `passed` steps of its last bit. */
        uint32_t base = 0, passed = mask, own = 0;
        for (int i = 0; i < 255; i++) {
            const uint32_t w = midpoints[i] != 0 ? magnitude_bits(midpoints[i]) - map->least : 0,
                           u = midpoints[i] < 0 ? ~w & map->range : w;
            if (u >> shift == index) {
                passed = u & mask;
                own++;
            } else if (midpoints[i] < 0) {
                /* Negative z have the upper half of the cells. */
                base += index < CELLS / 2 || u < index << shift;
            } else {
                base += u < index << shift && (!is_signed || index < CELLS / 2);
            }
        }
        if (own > 1) return 0;
        /* Less the index, which adding u brings in again. */
        own_cells[index] = (base << shift) + (mask - passed) - (index << shift);
    }
    return 1;
}

typedef struct {
    chunking chunks;
    const code_map *map;
    size_t block_size;
    float *numbers;
    uint8_t *codes;
    float *absmax;
} codes_job;

static void encode(void *pointer, size_t chunk) {
    const codes_job *j = pointer;
    size_t start, end;
    chunking_find(&j->chunks, chunk, &start, &end);
    for (; start < end; start += j->block_size) {
        const size_t count = end - start < j->block_size ? end - start : j->block_size;
        j->absmax[start / j->block_size] = loops()->quantize(j->map, j->numbers + start, count, j->codes + start);
    }
}

static void decode(void *pointer, size_t chunk) {
    const codes_job *j = pointer;
    size_t start, end;
    chunking_find(&j->chunks, chunk, &start, &end);
    for (; start < end; start += j->block_size) {
        const size_t count = end - start < j->block_size ? end - start : j->block_size;
        loops()->dequantize(j->map, j->codes + start, j->absmax[start / j->block_size], count, j->numbers + start);
    }
}

/* Whole blocks to a chunk. */
static size_t length_of(size_t block_size) { return block_size < CHUNK ? CHUNK / block_size * block_size : block_size; }

/* Numbers to codes and scales, or back. Returns 0 if memory ran out. */
EXPORT int headway_code(int backward, int is_signed, size_t count, size_t block_size, float *numbers, uint8_t *codes,
                        float *absmax, int threads) {
    codes_job j = {
        .map = &maps[is_signed], .block_size = block_size, .numbers = numbers, .codes = codes, .absmax = absmax};
    if (!chunking_make(&j.chunks, length_of(block_size), 1, &count)) return 0;
    parallel_for(chunking_count(&j.chunks), threads, backward ? decode : encode, &j);
    chunking_free(&j.chunks);
    return 1;
}

typedef struct {
    chunking chunks;
    adam_rule rule;
    int half;
    size_t block_size;
    void *const *params;
    void *const *grads;
    void *const *codes1;
    void *const *absmax1;
    void *const *codes2;
    void *const *absmax2;
    const float *step_sizes;
    const float *root_scales;
} adam8_job;

static void adam8(void *pointer, size_t chunk) {
    const adam8_job *j = pointer;
    size_t start, end, t = chunking_find(&j->chunks, chunk, &start, &end);
    adam8_tensor tensor = {
        j->params[t],  j->grads[t], j->codes1[t], j->absmax1[t],    j->codes2[t],
        j->absmax2[t], &maps[1],    &maps[0],     j->step_sizes[t], j->root_scales[t],
    };
    loops()->adam8(&j->rule, &tensor, j->half, start, end, j->block_size);
}

/* block_size <= BLOCK_LIMIT. Returns 0 if memory ran out (nothing is changed then). */
EXPORT int headway_adam8(size_t tensors, const size_t *sizes, int half, size_t block_size, void *const *params,
                         void *const *grads, void *const *codes1, void *const *absmax1, void *const *codes2,
                         void *const *absmax2, const float *step_sizes, const float *root_scales, double beta1,
                         double beta2, double eps, double decay_before, double decay_after, double l2, int maximize,
                         int threads) {
    adam8_job j = {
        .rule = make_rule(beta1, beta2, eps, decay_before, decay_after, l2, 0, -1, maximize),
        .half = half,
        .block_size = block_size,
        .params = params,
        .grads = grads,
        .codes1 = codes1,
        .absmax1 = absmax1,
        .codes2 = codes2,
        .absmax2 = absmax2,
        .step_sizes = step_sizes,
        .root_scales = root_scales,
    };
    if (!chunking_make(&j.chunks, length_of(block_size), tensors, sizes)) return 0;
    parallel_for(chunking_count(&j.chunks), threads, adam8, &j);
    chunking_free(&j.chunks);
    return 1;
}
