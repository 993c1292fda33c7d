/* The inner loops in plain C, written for the compiler to vectorise; included once per instruction set, with TABLE
   the name of that set's table and WIDTH the doubles of a register. */

#include "headway.h"

#include <math.h>
#include <string.h>

/* Vectors wider than the instruction set's registers are only passed to functions that are inlined. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE float from_bfloat16(uint16_t half) { return float_of((uint32_t)half << 16); }

/* Round to nearest, ties to even; NaN becomes PyTorch's 0x7fc0. */
INLINE uint16_t to_bfloat16(float x) {
    uint32_t bits = bits_of(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

/* Changes of a gradient up to here have a friction that is cheaper to compute: most have, of networks. */
#define SMALL_CHANGE 0.03125f

/* 1 + exp(-x) for 0 <= x <= SMALL_CHANGE to 2e-8. */
INLINE float one_and_exp_negative_small(float x) { return 2.0f - x * (1.0f - x * (0.5f - x * 0.16666667f)); }

/* exp(-x) for x >= 0 to 1e-7, as 2^n 2^f with |f| <= 1/2 and a minimax polynomial for 2^f. Below 2^-46 it is 2^-46,
   which is lost in the sum with one anyway; NaN counts as that too. */
INLINE float exp_negative(float x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold */
    float t = x * -1.44269504f;
    t = t > -46.0f ? t : -46.0f;
    float shifted = t + shift;
    float f = t - (shifted - shift);
    float f2 = f * f; /* Estrin's order: the chain of dependent operations is what the processor waits for */
    float power =
        (1.0f + 0.69314700f * f) + f2 * ((0.24022242f + 0.055507336f * f) + f2 * (0.0096715130f + 0.0013264720f * f));
    return power * float_of((bits_of(shifted) << 23) + 0x3f800000);
}

/* Elements of a block: what passes between the loops of a block stays in the first-level cache. */
enum { BLOCK = 512 };

/* Which parts of the rule a loop is compiled with: none of the rarer ones, all but the spike bound, or all. */
enum { BARE, OPTIONS, SPIKE };

INLINE int extent_of(const adam_rule *r) {
    if (r->spike != 0) return SPIKE;
    return r->sign == 1 && r->l2 == 0 && isinf(r->clip) && r->decay_after == 1 ? BARE : OPTIONS;
}

/* g as it enters the rule: ascent, coupled decay and the spike bound applied. */
INLINE float effective_gradient(const adam_rule *r, float p, float g, float v, int extent) {
    if (extent == BARE) return g;
    g = r->sign * g;
    g = r->l2 != 0.0f ? g + r->l2 * p : g;
    if (extent == SPIKE) {
        float bound = sqrtf(v * r->spike);
        float bounded = g < -bound ? -bound : g;
        bounded = bounded > bound ? bound : bounded;
        g = v > 0.0f ? bounded : g;
    }
    return g;
}

/* The step of one element: returns the new p, updates m and v. The denominator is multiplied by `inverse_xi`. */
INLINE float adam_element(const adam_rule *r, float p, float g, float *m, float *v, float step_size, float root_scale,
                          float inverse_xi, int friction, int extent) {
    const int near = r->lerp1 < 0.5f; /* torch.lerp has two forms, exact at either end */
    float c = g;
    if (extent != BARE) {
        c = c < -r->clip ? -r->clip : c;
        c = c > r->clip ? r->clip : c;
    }
    float difference = c - *m;
    *m = near ? *m + r->lerp1 * difference : c - difference * r->keep1;
    *v = *v * r->beta2 + r->weight2 * g * g;
    float denominator = sqrtf(*v) * root_scale + r->eps;
    if (friction) denominator = denominator * inverse_xi; /* one division for xi and the step */
    p = p * r->decay_before - step_size * *m / denominator;
    return extent == BARE ? p : p * r->decay_after;
}

/* The tensor's arrays from some element on. */
typedef struct {
    float *restrict params;
    const float *restrict grads;
    uint16_t *restrict half_params;
    const uint16_t *restrict half_grads;
    float *restrict exp_avgs;
    float *restrict exp_avg_sqs;
    float *restrict previous;
} adam_arrays;

INLINE void friction_tile(const adam_rule *r, const adam_arrays *a, size_t start, size_t count,
                          float *restrict inverse_xi, int half, int extent) {
    const adam_arrays own = *a;
    int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (size_t i = 0; i < count; i++) {
        float p = half ? from_bfloat16(own.half_params[start + i]) : own.params[start + i];
        float g = half ? from_bfloat16(own.half_grads[start + i]) : own.grads[start + i];
        g = effective_gradient(r, p, g, own.exp_avg_sqs[start + i], extent);
        float change = fabsf(own.previous[start + i] - g);
        int32_t magnitude = (int32_t)bits_of(change);
        largest = magnitude > largest ? magnitude : largest;
        inverse_xi[i] = change;
        own.previous[start + i] = g;
    }
    if (largest <= (int32_t)bits_of(SMALL_CHANGE)) {
#pragma omp simd
        for (size_t i = 0; i < count; i++) inverse_xi[i] = one_and_exp_negative_small(inverse_xi[i]);
    } else {
#pragma omp simd
        for (size_t i = 0; i < count; i++) {
            float change = inverse_xi[i], general = 1.0f + exp_negative(change);
            inverse_xi[i] = change <= SMALL_CHANGE ? one_and_exp_negative_small(change) : general;
        }
    }
}

INLINE void adam_tile(const adam_rule *r, const adam_arrays *a, size_t start, size_t count, float step_size,
                      float root_scale, const float *restrict inverse_xi, int half, int friction, int extent) {
    const adam_arrays own = *a;
#pragma omp simd
    for (size_t i = 0; i < count; i++) {
        float p = half ? from_bfloat16(own.half_params[start + i]) : own.params[start + i];
        float g = half ? from_bfloat16(own.half_grads[start + i]) : own.grads[start + i];
        float m = own.exp_avgs[start + i], v = own.exp_avg_sqs[start + i];
        g = effective_gradient(r, p, g, v, extent);
        p = adam_element(r, p, g, &m, &v, step_size, root_scale, friction ? inverse_xi[i] : 1.0f, friction, extent);
        own.exp_avgs[start + i] = m;
        own.exp_avg_sqs[start + i] = v;
        if (half) own.half_params[start + i] = to_bfloat16(p);
        else own.params[start + i] = p;
    }
}

enum { FRICTION_TILE = 32 };

INLINE void adam_range(const adam_rule *rule, const adam_tensor *tensor, size_t start, size_t end, int half,
                       int friction, int extent) {
    const adam_rule r = *rule;
    const float step_size = tensor->step_size, root_scale = tensor->root_scale;
    const adam_arrays a = {
        tensor->param, tensor->grad, tensor->param, tensor->grad, tensor->exp_avg, tensor->exp_avg_sq, tensor->previous,
    };
    if (!friction) {
        adam_tile(&r, &a, start, end - start, step_size, root_scale, NULL, half, 0, extent);
        return;
    }
    /* The friction of a tile goes with the step of the tile before: the processor overlaps its additions and
       multiplications with the other's root and division. */
    float inverse_xi[2][FRICTION_TILE];
    if (end - start >= FRICTION_TILE) {
        size_t turn = 0;
        friction_tile(&r, &a, start, FRICTION_TILE, inverse_xi[0], half, extent);
        for (; end - start >= 2 * FRICTION_TILE; start += FRICTION_TILE, turn = !turn) {
            friction_tile(&r, &a, start + FRICTION_TILE, FRICTION_TILE, inverse_xi[!turn], half, extent);
            adam_tile(&r, &a, start, FRICTION_TILE, step_size, root_scale, inverse_xi[turn], half, 1, extent);
        }
        adam_tile(&r, &a, start, FRICTION_TILE, step_size, root_scale, inverse_xi[turn], half, 1, extent);
        start += FRICTION_TILE;
    }
    friction_tile(&r, &a, start, end - start, inverse_xi[0], half, extent);
    adam_tile(&r, &a, start, end - start, step_size, root_scale, inverse_xi[0], half, 1, extent);
}

static void adam(const adam_rule *rule, const adam_tensor *tensor, int half, size_t start, size_t end) {
    const int extent = extent_of(rule);
#define CASE(HALF, FRICTION, EXTENT)                                                                                   \
    case HALF * 6 + FRICTION * 3 + EXTENT: adam_range(rule, tensor, start, end, HALF, FRICTION, EXTENT); break;
#define CASES(HALF, FRICTION) CASE(HALF, FRICTION, BARE) CASE(HALF, FRICTION, OPTIONS) CASE(HALF, FRICTION, SPIKE)
    switch (half * 6 + (tensor->previous != NULL) * 3 + extent) {
        CASES(0, 0)
        CASES(0, 1)
        CASES(1, 0)
        CASES(1, 1)
    }
#undef CASES
#undef CASE
}

INLINE void adagrad_range(const adagrad_rule *rule, const adagrad_tensor *tensor, size_t start, size_t end,
                          int diagonal, int two) {
    const adagrad_rule r = *rule;
    const float inverse = tensor->inverse;
    const int near = r.mix < 0.5f; /* the two forms of torch.lerp */
    float *restrict points = tensor->point;
    const float *restrict grads = tensor->grad;
    float *restrict xs = tensor->x;
    float *restrict sums = tensor->sum;
#pragma omp simd
    for (size_t i = start; i < end; i++) {
        float p = points[i], u = grads[i];
        if (diagonal) {
            float sum = sums[i] + r.weight * u * u;
            float root = sqrtf(sum);
            root = root > r.floor ? root : r.floor;
            sums[i] = sum;
            u = u / (root + r.eps);
        } else {
            u = u * inverse;
        }
        u = r.decay != 0.0f ? u + r.decay * p : u;
        p = r.point_step != 0.0f ? p - r.point_step * u : p;
        if (two) {
            float x = xs[i] - r.x_step * u, difference = x - p;
            xs[i] = x;
            p = near ? p + r.mix * difference : x - difference * r.keep;
        }
        points[i] = p;
    }
}

static void adagrad(const adagrad_rule *rule, const adagrad_tensor *tensor, size_t start, size_t end) {
    if (tensor->sum && tensor->x) adagrad_range(rule, tensor, start, end, 1, 1);
    else if (tensor->sum) adagrad_range(rule, tensor, start, end, 1, 0);
    else if (tensor->x) adagrad_range(rule, tensor, start, end, 0, 1);
    else adagrad_range(rule, tensor, start, end, 0, 0);
}

/* Loops over one or two arrays run through a chunk in several places at once: the processor fetches ahead within each
   stream, and one stream leaves memory idle. What does not divide evenly comes last. */
enum { STREAMS = 4 };

/* Exponent bits all ones: the bits without the sign are at least those of infinity. */
static int nonfinite_float(const uint32_t *bits, size_t count) {
    const size_t stream = count / STREAMS;
    int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (size_t i = 0; i < stream; i++) {
        for (size_t s = 0; s < STREAMS; s++) {
            int32_t magnitude = (int32_t)(bits[s * stream + i] & 0x7fffffff);
            largest = magnitude > largest ? magnitude : largest;
        }
    }
    for (size_t i = STREAMS * stream; i < count; i++) {
        int32_t magnitude = (int32_t)(bits[i] & 0x7fffffff);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest >= 0x7f800000;
}

static int nonfinite_bfloat16(const uint16_t *bits, size_t count) {
    const size_t stream = count / STREAMS;
    int16_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (size_t i = 0; i < stream; i++) {
        for (size_t s = 0; s < STREAMS; s++) {
            int16_t magnitude = (int16_t)(bits[s * stream + i] & 0x7fff);
            largest = magnitude > largest ? magnitude : largest;
        }
    }
    for (size_t i = STREAMS * stream; i < count; i++) {
        int16_t magnitude = (int16_t)(bits[i] & 0x7fff);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest >= 0x7f80;
}

INLINE float clamped(float x, float bound) {
    x = x < -bound ? -bound : x;
    return x > bound ? bound : x;
}

static void clamp(float *x, size_t count, float bound) {
    const size_t stream = count / STREAMS;
#pragma omp simd
    for (size_t i = 0; i < stream; i++)
        for (size_t s = 0; s < STREAMS; s++) x[s * stream + i] = clamped(x[s * stream + i], bound);
    for (size_t i = STREAMS * stream; i < count; i++) x[i] = clamped(x[i], bound);
}

/* Sums run in LANES lanes on every instruction set: four products, one from each row of a tile of 4 x LANES elements,
   are added in float and then to the lane's double. So a sum is right to 2e-7 of the sum of magnitudes. */
enum { LANES = 8, TILE = 4 * LANES, FLOATS = 2 * WIDTH < LANES ? 2 * WIDTH : LANES };
typedef float float_register __attribute__((vector_size(4 * FLOATS)));
typedef float float_part __attribute__((vector_size(4 * WIDTH)));
typedef double double_register __attribute__((vector_size(8 * WIDTH)));

typedef int32_t int_register __attribute__((vector_size(4 * FLOATS)));

/* Elements that are looked at together: as many as a register has lanes, times the bits of a mark that a lane holds. */
enum { MARKS = 32 / FLOATS < 4 ? 32 / FLOATS : 4, STRIP = MARKS * FLOATS };

INLINE uint32_t or_of_lanes(int_register lanes) {
    uint64_t pairs[FLOATS / 2], bits = 0;
    memcpy(pairs, &lanes, sizeof pairs);
    for (int i = 0; i < FLOATS / 2; i++) bits |= pairs[i];
    return (uint32_t)(bits | bits >> 32);
}

static size_t bracket(const uint32_t *bits, size_t count, uint32_t low, uint32_t high, uint32_t *inside, size_t *found,
                      uint32_t *largest) {
    const size_t stream = count / STREAMS / STRIP * STRIP;
    const int32_t lowest = (int32_t)low, highest = (int32_t)high;
    size_t kept = 0, hits = 0;
    uint32_t places_of_hits[CHUNK / STRIP], marks_of_hits[CHUNK / STRIP];
    int_register places, above = {0}, most = {0};
    for (int i = 0; i < FLOATS; i++) places[i] = 1 << i;
    for (size_t i = 0; i < stream; i += STRIP) {
        for (size_t s = 0; s < STREAMS; s++) {
            const uint32_t *x = bits + s * stream + i;
            int_register marks = {0};
            for (int r = 0; r < MARKS; r++) {
                int_register magnitudes;
                memcpy(&magnitudes, x + r * FLOATS, sizeof magnitudes);
                magnitudes &= 0x7fffffff;
                const int_register over = magnitudes > highest, more = magnitudes > most;
                above -= over;
                most = (more & magnitudes) | (~more & most);
                marks |= (magnitudes >= lowest) & ~over & places << (r * FLOATS);
            }
            places_of_hits[hits] = (uint32_t)(s * stream + i);
            marks_of_hits[hits] = or_of_lanes(marks);
            hits += marks_of_hits[hits] != 0;
        }
    }
    /* Apart from the loop above, where the branches of appending would be guessed wrong all the time. */
    for (size_t hit = 0; hit < hits; hit++) {
        uint32_t left = marks_of_hits[hit];
        do {
            inside[kept++] = bits[places_of_hits[hit] + (uint32_t)__builtin_ctz(left)] & 0x7fffffff;
            left &= left - 1;
        } while (left);
    }
    size_t over = 0;
    uint32_t top = 0;
    for (int i = 0; i < FLOATS; i++) {
        over += (size_t)above[i];
        top = (uint32_t)most[i] > top ? (uint32_t)most[i] : top;
    }
    for (size_t i = STREAMS * stream; i < count; i++) {
        const uint32_t magnitude = bits[i] & 0x7fffffff;
        over += magnitude > high;
        top = magnitude > top ? magnitude : top;
        if (magnitude - low <= high - low) inside[kept++] = magnitude;
    }
    *found = kept;
    *largest = top;
    return over;
}

INLINE float_register load(const float *x) {
    float_register lanes;
    memcpy(&lanes, x, sizeof lanes);
    return lanes;
}

INLINE void add_products(double_register sum[LANES / WIDTH], const float *x, const float *y) {
    float_register products[LANES / FLOATS];
    float_part parts[LANES / WIDTH];
    for (int r = 0; r < LANES / FLOATS; r++) {
        const float *a = x + r * FLOATS, *b = y + r * FLOATS;
        products[r] = (load(a) * load(b) + load(a + LANES) * load(b + LANES)) +
                      (load(a + 2 * LANES) * load(b + 2 * LANES) + load(a + 3 * LANES) * load(b + 3 * LANES));
    }
    memcpy(parts, products, sizeof parts);
    for (int r = 0; r < LANES / WIDTH; r++) sum[r] += __builtin_convertvector(parts[r], double_register);
}

INLINE double sum_of_lanes(const void *lanes) {
    double x[LANES];
    memcpy(x, lanes, sizeof x);
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

static void dots(const float *g, const float *w, size_t count, double sums[3]) {
    double_register wg[LANES / WIDTH] = {0}, ww[LANES / WIDTH] = {0}, gg[LANES / WIDTH] = {0};
    const size_t stream = count / 2 / TILE * TILE; /* two of g and two of w */
    size_t i = 0;
    for (; i < stream; i += TILE) {
        for (size_t j = i; j <= i + stream; j += stream) {
            add_products(wg, w + j, g + j);
            add_products(ww, w + j, w + j);
            add_products(gg, g + j, g + j);
        }
    }
    for (i = 2 * stream; i < count; i += TILE) {
        const size_t left = count - i < TILE ? count - i : TILE;
        float last_g[TILE] = {0}, last_w[TILE] = {0};
        memcpy(last_g, g + i, left * sizeof *g);
        memcpy(last_w, w + i, left * sizeof *w);
        add_products(wg, last_w, last_g);
        add_products(ww, last_w, last_w);
        add_products(gg, last_g, last_g);
    }
    sums[0] = sum_of_lanes(wg);
    sums[1] = sum_of_lanes(ww);
    sums[2] = sum_of_lanes(gg);
}

static void dots_double(const float *g, const float *w, size_t count, double sums[3]) {
    double wg[LANES] = {0}, ww[LANES] = {0}, gg[LANES] = {0};
    for (size_t i = 0; i < count; i++) {
        const double x = g[i], y = w[i];
        wg[i % LANES] += y * x;
        ww[i % LANES] += y * y;
        gg[i % LANES] += x * x;
    }
    sums[0] = sum_of_lanes(wg);
    sums[1] = sum_of_lanes(ww);
    sums[2] = sum_of_lanes(gg);
}

static double squares(const float *g, size_t count) {
    double_register gg[LANES / WIDTH] = {0};
    const size_t stream = count / STREAMS / TILE * TILE;
    size_t i = 0;
    for (; i < stream; i += TILE)
        for (size_t s = 0; s < STREAMS; s++) add_products(gg, g + s * stream + i, g + s * stream + i);
    for (i = STREAMS * stream; i < count; i += TILE) {
        const size_t left = count - i < TILE ? count - i : TILE;
        float last[TILE] = {0};
        memcpy(last, g + i, left * sizeof *g);
        add_products(gg, last, last);
    }
    return sum_of_lanes(gg);
}

static double squares_double(const float *g, size_t count) {
    double gg[LANES] = {0};
    for (size_t i = 0; i < count; i++) gg[i % LANES] += (double)g[i] * (double)g[i];
    return sum_of_lanes(gg);
}

static double residual(const float *g, const float *w, size_t count, double along) {
    double squares[LANES] = {0};
    for (size_t i = 0; i < count; i++) {
        const double rest = (double)g[i] - along * (double)w[i];
        squares[i % LANES] += rest * rest;
    }
    return sum_of_lanes(squares);
}

static void project(float *restrict g, const float *restrict w, size_t count, double along, double scale) {
    const float multiple = (float)along, factor = (float)scale;
    const size_t stream = count / 2; /* two of g and two of w */
#pragma omp simd
    for (size_t i = 0; i < stream; i++) {
        g[i] = (g[i] - multiple * w[i]) * factor;
        g[stream + i] = (g[stream + i] - multiple * w[stream + i]) * factor;
    }
    if (count % 2) g[count - 1] = (g[count - 1] - multiple * w[count - 1]) * factor;
}

static void project_double(float *restrict g, const float *restrict w, size_t count, double along, double scale) {
#pragma omp simd
    for (size_t i = 0; i < count; i++) g[i] = (float)(((double)g[i] - along * (double)w[i]) * scale);
}

#include "loops_blockwise.h"

const loop_table TABLE = {
    adam,    adagrad,        nonfinite_float, nonfinite_bfloat16, bracket,        clamp,    dots,       dots_double,
    squares, squares_double, residual,        project,            project_double, quantize, dequantize, adam8,
};
