/* Block-wise 8-bit quantisation and the Adam step on 8-bit moments; part of loops.h.

   Tables are read by ordinary loads, between vector loops: gather instructions are no faster on most processors, and
   many times slower on those whose microcode had to make them safe. */

/* Hides how `index` came about, so that the compiler does not turn a loop of table look-ups into gathers. */
#define OPAQUE(index) __asm__("" : "+r"(index))

INLINE void look_up_codes(const float *restrict values, const uint8_t *restrict codes, size_t count,
                          float *restrict x) {
#pragma GCC unroll 8
    for (size_t i = 0; i < count; i++) {
        size_t code = codes[i];
        OPAQUE(code);
        x[i] = values[code];
    }
}

INLINE float largest_magnitude(const float *x, size_t count) {
    int32_t largest = 0; /* as an integer: NaN is larger than everything */
#pragma omp simd reduction(max : largest)
    for (size_t i = 0; i < count; i++) {
        int32_t magnitude = (int32_t)(bits_of(x[i]) & 0x7fffffff);
        largest = magnitude > largest ? magnitude : largest;
    }
    return float_of((uint32_t)largest);
}

/* The u of x / divisor. */
INLINE void reduce(const code_map *map, const float *restrict x, size_t count, float divisor, uint32_t *restrict u,
                   int is_signed) {
    const uint32_t range = map->range;
    const int32_t least = (int32_t)map->least;
#pragma omp simd
    for (size_t i = 0; i < count; i++) {
        int32_t bits = (int32_t)bits_of(x[i] / divisor), sign = bits >> 31;
        if (is_signed) bits &= 0x7fffffff;
        int32_t w = (bits > least ? bits : least) - least, positive = bits < 1 ? bits : 1;
        if (!is_signed) w = w > positive ? w : positive; /* at least 1 for z > 0 */
        u[i] = is_signed ? (uint32_t)(w ^ sign) & range : (uint32_t)w;
    }
}

INLINE void find_codes(const uint32_t *restrict cells, uint32_t shift, const uint32_t *restrict u, size_t count,
                       uint8_t *restrict codes) {
#pragma GCC unroll 32
    for (size_t i = 0; i < count; i++) {
        size_t index = u[i] >> shift;
        OPAQUE(index);
        codes[i] = (uint8_t)((cells[index] + u[i]) >> shift);
    }
}

enum { CODE_TILE = 16, ADAM_TILE = 8 };

/* The codes of x / absmax. Vector and scalar work on neighbouring tiles alternate: the processor overlaps them. */
INLINE void encode(const code_map *map, const float *x, size_t count, float absmax, uint8_t *codes, int is_signed) {
    const float divisor = absmax == 0.0f ? 1.0f : absmax;
    const uint32_t shift = is_signed ? SIGNED_SHIFT : UNSIGNED_SHIFT, *cells = map->cells;
    uint32_t u[2][CODE_TILE];
    size_t i = 0;
    if (count >= 2 * CODE_TILE) {
        reduce(map, x, CODE_TILE, divisor, u[0], is_signed);
        for (; i + 3 * CODE_TILE <= count; i += 2 * CODE_TILE) {
            reduce(map, x + i + CODE_TILE, CODE_TILE, divisor, u[1], is_signed);
            find_codes(cells, shift, u[0], CODE_TILE, codes + i);
            reduce(map, x + i + 2 * CODE_TILE, CODE_TILE, divisor, u[0], is_signed);
            find_codes(cells, shift, u[1], CODE_TILE, codes + i + CODE_TILE);
        }
    }
    for (; i < count; i += CODE_TILE) {
        const size_t length = count - i < CODE_TILE ? count - i : CODE_TILE;
        reduce(map, x + i, length, divisor, u[0], is_signed);
        find_codes(cells, shift, u[0], length, codes + i);
    }
}

/* As PyTorch does: what is not a number is above all midpoints, and anything else is 0 next to an infinity. */
static void encode_not_finite(const code_map *map, const float *x, size_t count, float absmax, uint8_t *codes) {
    uint8_t zero = 0;
    while (map->values[zero] != 0) zero++;
    for (size_t i = 0; i < count; i++) codes[i] = isnan(x[i] / absmax) ? 255 : zero;
}

INLINE void encode_any(const code_map *map, const float *x, size_t count, float absmax, uint8_t *codes) {
    if (!isfinite(absmax)) encode_not_finite(map, x, count, absmax, codes);
    else if (map->range) encode(map, x, count, absmax, codes, 1);
    else encode(map, x, count, absmax, codes, 0);
}

static float quantize(const code_map *map, const float *x, size_t count, uint8_t *codes) {
    const float absmax = largest_magnitude(x, count);
    encode_any(map, x, count, absmax, codes);
    return absmax;
}

static void dequantize(const code_map *map, const uint8_t *codes, float absmax, size_t count, float *x) {
    for (size_t start = 0; start < count; start += BLOCK) {
        const size_t length = count - start < BLOCK ? count - start : BLOCK;
        look_up_codes(map->values, codes + start, length, x + start);
#pragma omp simd
        for (size_t i = start; i < start + length; i++) x[i] *= absmax;
    }
}

/* The step of `count` elements, whose moments come as map values and scales, and leave as numbers. */
INLINE void adam8_tile(const adam_rule *r, void *param, const void *grad, float *restrict exp_avgs,
                       float *restrict exp_avg_sqs, float absmax1, float absmax2, float step_size, float root_scale,
                       size_t count, int half, int extent) {
    float *restrict params = param;
    const float *restrict grads = grad;
    uint16_t *restrict half_params = param;
    const uint16_t *restrict half_grads = grad;
#pragma omp simd
    for (size_t i = 0; i < count; i++) {
        float p = half ? from_bfloat16(half_params[i]) : params[i];
        float g = half ? from_bfloat16(half_grads[i]) : grads[i];
        float m = exp_avgs[i] * absmax1, v = exp_avg_sqs[i] * absmax2;
        g = effective_gradient(r, p, g, v, extent);
        p = adam_element(r, p, g, &m, &v, step_size, root_scale, 1.0f, 0, extent);
        exp_avgs[i] = m;
        exp_avg_sqs[i] = v;
        if (half) half_params[i] = to_bfloat16(p);
        else params[i] = p;
    }
}

INLINE void adam8_range(const adam_rule *rule, const adam8_tensor *t, size_t start, size_t end, size_t block_size,
                        int half, int extent) {
    const adam_rule r = *rule;
    const size_t width = half ? 2 : 4;
    const float step_size = t->step_size, root_scale = t->root_scale;
    const float *values1 = t->map1->values, *values2 = t->map2->values;
    float m[BLOCK_LIMIT], v[BLOCK_LIMIT];
    for (size_t block = start / block_size; start < end; start += block_size, block++) {
        const size_t count = end - start < block_size ? end - start : block_size;
        char *params = (char *)t->param + start * width;
        const char *grads = (const char *)t->grad + start * width;
        uint8_t *codes1 = t->codes1 + start, *codes2 = t->codes2 + start;
        const float absmax1 = t->absmax1[block], absmax2 = t->absmax2[block];
        size_t i = 0;
        if (count >= 2 * ADAM_TILE) {
            look_up_codes(values1, codes1, ADAM_TILE, m);
            look_up_codes(values2, codes2, ADAM_TILE, v);
            for (; i + 2 * ADAM_TILE <= count; i += ADAM_TILE) {
                look_up_codes(values1, codes1 + i + ADAM_TILE, ADAM_TILE, m + i + ADAM_TILE);
                look_up_codes(values2, codes2 + i + ADAM_TILE, ADAM_TILE, v + i + ADAM_TILE);
                adam8_tile(&r, params + i * width, grads + i * width, m + i, v + i, absmax1, absmax2, step_size,
                           root_scale, ADAM_TILE, half, extent);
            }
        }
        look_up_codes(values1, codes1 + i, count - i, m + i);
        look_up_codes(values2, codes2 + i, count - i, v + i);
        adam8_tile(&r, params + i * width, grads + i * width, m + i, v + i, absmax1, absmax2, step_size, root_scale,
                   count - i, half, extent);
        t->absmax1[block] = largest_magnitude(m, count);
        t->absmax2[block] = largest_magnitude(v, count);
        encode_any(t->map1, m, count, t->absmax1[block], codes1);
        encode_any(t->map2, v, count, t->absmax2[block], codes2);
    }
}

static void adam8(const adam_rule *rule, const adam8_tensor *tensor, int half, size_t start, size_t end,
                  size_t block_size) {
    const int bare = extent_of(rule) == BARE;
    if (half && bare) adam8_range(rule, tensor, start, end, block_size, 1, BARE);
    else if (half) adam8_range(rule, tensor, start, end, block_size, 1, OPTIONS);
    else if (bare) adam8_range(rule, tensor, start, end, block_size, 0, BARE);
    else adam8_range(rule, tensor, start, end, block_size, 0, OPTIONS);
}
