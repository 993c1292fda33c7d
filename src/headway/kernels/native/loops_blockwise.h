/* Block-wise 8-bit quantisation and the Adam step on 8-bit moments; part of loops.h.

   Tables are read by ordinary loads, between vector loops: gather instructions are no faster on most processors, and many
   times slower on those whose microcode had to make them safe. */

/* Hides how `index` came about, so that the compiler does not turn a loop of table look-ups into gathers. */
#define OPAQUE(index) __asm__("" : "+r"(index))

INLINE void look_up_codes(const float *restrict values, const uint8_t *restrict codes, size_t count, float *restrict x) {
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

/* The codes of x / absmax. */
INLINE void encode(const code_map *map, const float *x, size_t count, float absmax, uint8_t *codes) {
    const float divisor = absmax == 0.0f ? 1.0f : absmax;
    const uint32_t shift = map->shift, mask = (1u << shift) - 1;
    const int32_t first = (int32_t)map->first, last = (int32_t)map->last, negative = (int32_t)map->count;
    const uint32_t *cells = map->cells;
    uint32_t cell[BLOCK], low[BLOCK];
    for (size_t start = 0; start < count; start += BLOCK) {
        const size_t length = count - start < BLOCK ? count - start : BLOCK;
        const float *restrict from = x + start;
        uint8_t *restrict to = codes + start;
#pragma omp simd
        for (size_t i = 0; i < length; i++) {
            uint32_t bits = bits_of(from[i] / divisor);
            int32_t sign = (int32_t)bits >> 31; /* all ones for negative numbers, whose order is reversed */
            int32_t index = (int32_t)((bits & 0x7fffffff) >> shift);
            index = index < first ? first : index;
            index = index > last ? last : index;
            cell[i] = (uint32_t)(index - first + (sign & negative));
            low[i] = (bits ^ (uint32_t)sign) & mask;
        }
        for (size_t i = 0; i < length; i++) {
            size_t index = cell[i];
            OPAQUE(index);
            cell[i] = cells[index];
        }
#pragma omp simd
        for (size_t i = 0; i < length; i++) to[i] = (uint8_t)((cell[i] + low[i]) >> shift);
    }
}

static float quantize(const code_map *map, const float *x, size_t count, uint8_t *codes) {
    const float absmax = largest_magnitude(x, count);
    encode(map, x, count, absmax, codes);
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

INLINE void adam8_range(const adam_rule *rule, const adam8_tensor *t, size_t start, size_t end, size_t block_size, int half,
                        int extent) {
    const adam_rule r = *rule;
    const float step_size = t->step_size, root_scale = t->root_scale;
    float exp_avgs[BLOCK_LIMIT], exp_avg_sqs[BLOCK_LIMIT];
    for (size_t block = start / block_size; start < end; start += block_size, block++) {
        const size_t count = end - start < block_size ? end - start : block_size;
        float *restrict params = (float *)t->param + start;
        const float *restrict grads = (const float *)t->grad + start;
        uint16_t *restrict half_params = (uint16_t *)t->param + start;
        const uint16_t *restrict half_grads = (const uint16_t *)t->grad + start;
        const float absmax1 = t->absmax1[block], absmax2 = t->absmax2[block];
        int32_t largest1 = 0, largest2 = 0;
        look_up_codes(t->map1->values, t->codes1 + start, count, exp_avgs);
        look_up_codes(t->map2->values, t->codes2 + start, count, exp_avg_sqs);
#pragma omp simd reduction(max : largest1, largest2)
        for (size_t i = 0; i < count; i++) {
            float p = half ? from_bfloat16(half_params[i]) : params[i];
            float g = half ? from_bfloat16(half_grads[i]) : grads[i];
            float m = exp_avgs[i] * absmax1, v = exp_avg_sqs[i] * absmax2;
            g = effective_gradient(&r, p, g, v, extent);
            p = adam_element(&r, p, g, &m, &v, step_size, root_scale, 1.0f, 0, extent);
            exp_avgs[i] = m;
            exp_avg_sqs[i] = v;
            int32_t magnitude1 = (int32_t)(bits_of(m) & 0x7fffffff), magnitude2 = (int32_t)(bits_of(v) & 0x7fffffff);
            largest1 = magnitude1 > largest1 ? magnitude1 : largest1;
            largest2 = magnitude2 > largest2 ? magnitude2 : largest2;
            if (half) half_params[i] = to_bfloat16(p);
            else params[i] = p;
        }
        t->absmax1[block] = float_of((uint32_t)largest1);
        t->absmax2[block] = float_of((uint32_t)largest2);
        encode(t->map1, exp_avgs, count, t->absmax1[block], t->codes1 + start);
        encode(t->map2, exp_avg_sqs, count, t->absmax2[block], t->codes2 + start);
    }
}

static void adam8(const adam_rule *rule, const adam8_tensor *tensor, int half, size_t start, size_t end, size_t block_size) {
    const int bare = extent_of(rule) == BARE;
    if (half && bare) adam8_range(rule, tensor, start, end, block_size, 1, BARE);
    else if (half) adam8_range(rule, tensor, start, end, block_size, 1, OPTIONS);
    else if (bare) adam8_range(rule, tensor, start, end, block_size, 0, BARE);
    else adam8_range(rule, tensor, start, end, block_size, 0, OPTIONS);
}
