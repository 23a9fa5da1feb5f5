/* y[M, N] = x[M, K] @ W[N, K]^T (+ bias), x and y float32, W in panels of 16 output rows (see layout.py).

   One lane of a vector is one output. An output's sum runs over k in the same order whatever M, N and the number of
   threads, so a row of y depends, bit for bit, on its row of x alone:
     float kinds: blocks of BLOCK values of k, one fused multiply-add after another inside a block, blocks in order;
                  w16a16 takes two values of k at a time;
     int8, int4:  groups of GROUP values of k, exact in integers, then one fused multiply-add a group, in order.
   Rows of x go in tiles of up to ROWS; tiles change which outputs share a loaded weight, never the order of a sum.
   In the integer kinds x is rounded to 8 bits with a scale a row and group, in w16a16 to bfloat16.

   Compiled for AVX-512 VNNI, with or without BF16, or for AVX2, FMA and F16C. Reading weights is what decoding costs:
   16 rows by 16 columns are one load or a few, and the next ones are asked for ahead. */

#include "panels.h"

#include <omp.h>

enum { FP32, FP16, BF16, W16A16, INT8, INT4 }; /* in the order of kinds.py */
enum { GROUP = 128, BLOCK = 256, QUADS = GROUP / 4, AHEAD = 4096 };

#ifdef __AVX512VNNI__
enum { ROWS = 12 };
INLINE int most_rows(int kind) { return ROWS; }
/* Panels side by side for r rows: as many sums as fit the 32 registers beside the weights, enough to hide latency; of
   int4, whose bytes are few, one panel after another comes faster from memory. */
INLINE int side_by_side(int kind, int r) { return kind == INT4 ? (r <= 8 ? 1 : 2) : r <= 6 ? 4 : 2; }
#else
enum { ROWS = 6 };
INLINE int most_rows(int kind) { return kind >= INT8 ? 4 : ROWS; }
INLINE int side_by_side(int kind, int r) { return kind >= INT8 ? (r == 1 ? 2 : 1) : r == 1 ? 4 : r <= 3 ? 2 : 1; }
#endif

enum { SIDE = 4, SPLIT = 4 }; /* the most that side_by_side gives, and into which a sum is split */

/* ---- one tile: r rows of x by p panels --------------------------------------------------------------------------- */

typedef struct {
    const void *weights;
    const void *scales; /* int8: float [N]; int4: bfloat16 [panel, group, 16]; else unused */
    const float *bias;  /* [N], or null */
    float *y;           /* [M, N] */
    int64_t rows, outputs, inputs, groups, panels;
    /* x by tiles, [depth, row] of four bytes: a value, two of bfloat16, or four of 8 bits. */
    void *values;
    int64_t depth;
    float *steps;  /* [tile][group, row]: what one integer stands for */
    int32_t *sums; /* [tile][group, row]: of the integers */
} product;

INLINE int64_t depth_of(int kind, int64_t inputs) {
    switch (kind) {
        case FP32: case FP16: return inputs;
        case BF16: return (inputs + 1) / 2 * 2; /* weights come in pairs */
        case W16A16: return (inputs + 1) / 2;
        default: return (inputs + GROUP - 1) / GROUP * QUADS;
    }
}

/* Of a panel's weights, those that meet four bytes of x. */
INLINE int64_t step_bytes(int kind) { return LANES * (kind == FP16 || kind == BF16 || kind == INT4 ? 2 : 4); }

/* What to ask for ahead of `at`, a place in one of p panels, of which `left` bytes are still to come: the panels beside
   it are being read too, so behind its end come the bytes of the next panel in its row of them. */
INLINE const char *ahead(const void *at, int64_t left, int64_t bytes, int p) {
    return (const char *)at + AHEAD / p + (left <= AHEAD / p ? (p - 1) * bytes : 0);
}

/* 16 values of k, or 16 pairs of bfloat16: of these the one half, the other, or both as they are. */
INLINE floats read_weights(int kind, const char *at, int half) {
    switch (kind) {
        case FP16: return from_fp16((const uint16_t *)at);
        case BF16: return half ? high16(load((const float *)at)) : low16(load((const float *)at));
        default: return load((const float *)at);
    }
}

INLINE void float_sums(int kind, int r, int p, const product *a, const char **panel, int64_t first, floats *total) {
    const float *x = (const float *)a->values + first * a->depth;
    const int64_t step = step_bytes(kind), bytes = a->depth * step;
    const int together = kind == BF16 ? 2 : 1, block = kind == W16A16 ? BLOCK / 2 : BLOCK;
    for (int64_t from = 0; from < a->depth; from += block) {
        int64_t to = from + block < a->depth ? from + block : a->depth;
        floats sum[ROWS][SIDE];
        UNROLL for (int i = 0; i < r; i++) UNROLL for (int j = 0; j < p; j++) sum[i][j] = zeros();
        for (int64_t k = from; k < to; k += together) UNROLL for (int half = 0; half < together; half++) {
            floats w[SIDE];
            UNROLL for (int j = 0; j < p; j++) {
                const char *at = panel[j] + k * step;
                if (!half) _mm_prefetch(ahead(at, bytes - k * step, bytes, p), _MM_HINT_T0);
                w[j] = read_weights(kind, at, half);
            }
            UNROLL for (int i = 0; i < r; i++) {
                floats value = spread(x[(k + half) * r + i]);
                UNROLL for (int j = 0; j < p; j++)
                    sum[i][j] = kind == W16A16 ? dot16(value, w[j], sum[i][j]) : fused(value, w[j], sum[i][j]);
            }
        }
        UNROLL for (int i = 0; i < r; i++) UNROLL for (int j = 0; j < p; j++)
            total[i * p + j] = add(total[i * p + j], sum[i][j]);
    }
}

INLINE void integer_sums(int kind, int r, int p, const product *a, const char **panel, const uint16_t **scales,
                         int64_t first, floats *total) {
    const int32_t *x = (const int32_t *)a->values + first * a->depth;
    const int64_t step = step_bytes(kind), bytes = a->depth * step;
    /* Whole numbers may be added in any order: few sums are split, so that they need not wait for each other. */
    const int split = r * p >= 4 ? 1 : r * p > 1 ? 2 : 4, quads = kind == INT8 ? 1 : 2;
    for (int64_t g = 0; g < a->groups; g++) {
        integers sum[ROWS][SIDE], more[SPLIT][SPLIT];
        const int64_t side = first * a->groups + g * r;
        UNROLL for (int i = 0; i < r; i++) {
            integers start = spread_integer(-(kind == INT8 ? SHIFT8 : 8) * a->sums[side + i]);
            UNROLL for (int j = 0; j < p; j++) sum[i][j] = start;
        }
        UNROLL for (int c = 1; c < split; c++) UNROLL for (int i = 0; i < r * p; i++) more[c][i] = spread_integer(0);
        for (int64_t q = g * QUADS; q < (g + 1) * QUADS;) UNROLL for (int c = 0; c < split; c++, q += quads) {
            integers low[SIDE], high[SIDE];
            UNROLL for (int j = 0; j < p; j++) {
                const uint8_t *at = (const uint8_t *)panel[j] + q * step;
                _mm_prefetch(ahead(at, bytes - q * step, bytes, p), _MM_HINT_T0);
                low[j] = kind == INT8 ? weights8(at) : low4(at);
                if (kind == INT4) high[j] = high4(at);
            }
            UNROLL for (int i = 0; i < r; i++) {
                integers even = spread_integer(x[q * r + i]), odd = even;
                if (kind == INT4) odd = spread_integer(x[(q + 1) * r + i]);
                UNROLL for (int j = 0; j < p; j++) {
                    integers *to = c ? &more[c][i * p + j] : &sum[i][j];
                    *to = kind == INT8 ? dot8(*to, low[j], even) : dot4(*to, low[j], high[j], even, odd);
                }
            }
        }
        UNROLL for (int c = 1; c < split; c++) UNROLL for (int i = 0; i < r; i++) UNROLL for (int j = 0; j < p; j++)
            sum[i][j] = add_integers(sum[i][j], more[c][i * p + j]);
        UNROLL for (int j = 0; j < p; j++) {
            floats scale = zeros();
            if (kind == INT4) scale = from_bf16(scales[j] + g * LANES);
            UNROLL for (int i = 0; i < r; i++) {
                floats value = to_floats(sum[i][j]);
                if (kind == INT4) value = multiply(value, scale);
                total[i * p + j] = fused(value, spread(a->steps[side + i]), total[i * p + j]);
            }
        }
    }
}

/* Rows first .. first + r - 1 of y for `count` <= p panels from `panel` on. */
INLINE void tile(int kind, int r, const product *a, int64_t first, int64_t start, int64_t count) {
    const int p = side_by_side(kind, r);
    const char *panel[SIDE];
    const uint16_t *scales[SIDE];
    floats total[ROWS * SIDE];
    for (int j = 0; j < p; j++) {
        int64_t number = start + (j < count ? j : 0); /* beyond the last one: the first again, and not stored */
        panel[j] = (const char *)a->weights + number * a->depth * step_bytes(kind);
        scales[j] = (const uint16_t *)a->scales + number * a->groups * LANES;
    }
    for (int i = 0; i < r * p; i++) total[i] = zeros();
    if (kind >= INT8) integer_sums(kind, r, p, a, panel, scales, first, total);
    else float_sums(kind, r, p, a, panel, first, total);
    for (int j = 0; j < p && j < count; j++) {
        int64_t column = (start + j) * LANES, width = a->outputs - column < LANES ? a->outputs - column : LANES;
        float bias[LANES] = {0}, scale[LANES] = {0};
        if (a->bias) memcpy(bias, a->bias + column, width * sizeof(float));
        if (kind == INT8) memcpy(scale, (const float *)a->scales + column, width * sizeof(float));
        for (int i = 0; i < r; i++) {
            float *to = a->y + (first + i) * a->outputs + column, whole[LANES];
            floats value = total[i * p + j];
            value = kind == INT8 ? fused(value, load(scale), load(bias)) : add(value, load(bias));
            if (width == LANES) store(to, value);
            else store(whole, value), memcpy(to, whole, width * sizeof(float));
        }
    }
}

/* ---- all of it --------------------------------------------------------------------------------------------------- */

/* One group of k of one tile: x beside each other for the tile's rows, rounded where the kind asks for it. */
static void arrange(int kind, int function, const product *a, const float *x, int64_t first, int64_t r, int64_t g) {
    int64_t from = g * GROUP, width = a->inputs - from < GROUP ? a->inputs - from : GROUP;
    for (int64_t i = 0; i < r; i++) {
        float row[GROUP] = {0};
        memcpy(row, x + (first + i) * a->inputs + from, width * sizeof(float));
        if (function != AS_IS)
            for (int64_t k = 0; k < width; k += LANES) store(row + k, activated(function, load(row + k)));
        if (kind < W16A16) {
            float *to = (float *)a->values + first * a->depth + from * r + i;
            for (int64_t k = 0; from + k < a->depth && k < GROUP; k++) to[k * r] = row[k];
            continue;
        }
        if (kind == W16A16) {
            int32_t *to = (int32_t *)a->values + first * a->depth + from / 2 * r + i;
            for (int64_t k = 0; k < width; k += 2) to[k / 2 * r] = to_bf16(row[k]) | (int32_t)to_bf16(row[k + 1]) << 16;
            continue;
        }
        int32_t *to = (int32_t *)a->values + first * a->depth + g * r * QUADS + i;
        /* As integers, magnitudes compare alike, with infinity and nan above all numbers. */
        int32_t bits[GROUP], most = 0, sum = 0;
        int8_t whole[GROUP];
        memcpy(bits, row, sizeof(row));
        for (int k = 0; k < GROUP; k++) most = (bits[k] & INT32_MAX) > most ? bits[k] & INT32_MAX : most;
        float largest = most < 0x7f800000 ? as_float(most) : NAN, inverse = most ? 127 / largest : 0;
        for (int k = 0; k < GROUP; k++) whole[k] = (int8_t)as_bits(as_float(bits[k]) * inverse + ROUNDER);
        for (int k = 0; k < GROUP; k++) sum += whole[k];
        for (int64_t q = 0; q < QUADS; q++) memcpy(to + q * r, whole + 4 * q, 4);
        a->steps[first * a->groups + g * r + i] = largest / 127;
        a->sums[first * a->groups + g * r + i] = sum;
    }
}

/* A function a kind: inside, all that decides the loops' shape is constant. */
#define TILE(kind, r) case r: tile(kind, r, a, first, start, count); return;
#ifdef __AVX512VNNI__
#define MORE_TILES(kind) TILE(kind, 7) TILE(kind, 8) TILE(kind, 9) TILE(kind, 10) TILE(kind, 11) TILE(kind, 12)
#else
#define MORE_TILES(kind)
#endif
#define FOR_KIND(name, kind) \
    static void name(const product *a, int64_t r, int64_t first, int64_t start, int64_t count) { \
        switch (r) { \
            TILE(kind, 1) TILE(kind, 2) TILE(kind, 3) TILE(kind, 4) TILE(kind, 5) TILE(kind, 6) MORE_TILES(kind) \
        } \
    }
FOR_KIND(tile_fp32, FP32)
FOR_KIND(tile_fp16, FP16)
FOR_KIND(tile_bf16, BF16)
FOR_KIND(tile_w16a16, W16A16)
FOR_KIND(tile_int8, INT8)
FOR_KIND(tile_int4, INT4)

/* Bytes of scratch memory that a product wants. */
int64_t neox_scratch(int kind, int64_t rows, int64_t inputs) {
    int64_t groups = (inputs + GROUP - 1) / GROUP;
    return rows * 4 * (depth_of(kind, inputs) + (kind < INT8 ? 0 : 2 * groups));
}

void neox_product(const matrix *m, int function, const float *x, float *y, void *scratch, int64_t rows) {
    const int kind = (int)m->kind;
    const int64_t groups = (m->inputs + GROUP - 1) / GROUP;
    product a = {.weights = m->weights, .scales = m->scales, .bias = m->bias, .y = y, .rows = rows,
                 .outputs = m->outputs, .inputs = m->inputs, .groups = groups,
                 .panels = (m->outputs + LANES - 1) / LANES, .values = scratch, .depth = depth_of(kind, m->inputs)};
    if (kind >= INT8) {
        a.steps = (float *)scratch + rows * a.depth;
        a.sums = (int32_t *)(a.steps + rows * groups);
    }
    static void (*const tiles_of[])(const product *, int64_t, int64_t, int64_t, int64_t) = {
        tile_fp32, tile_fp16, tile_bf16, tile_w16a16, tile_int8, tile_int4};
    const int64_t tiles = (rows + most_rows(kind) - 1) / most_rows(kind), height = (rows + tiles - 1) / tiles;
    const int64_t side = side_by_side(kind, (int)height), chunks = (a.panels + side - 1) / side;
    /* Where this thread will begin, on its way while x is arranged. */
    const int64_t bytes = a.depth * step_bytes(kind);
    const int64_t mine = chunks * omp_get_thread_num() / omp_get_num_threads() * side;
    for (int64_t j = mine; j < mine + side && j < a.panels; j++)
        for (int64_t at = 0; at < AHEAD / side; at += 64)
            _mm_prefetch((const char *)a.weights + j * bytes + at, _MM_HINT_T0);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < tiles * groups; unit++) {
        int64_t first = unit / groups * height, left = rows - first;
        if (left > 0) arrange(kind, function, &a, x, first, left < height ? left : height, unit % groups);
    }
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t start = chunk * side, end = start + side < a.panels ? start + side : a.panels;
        for (int64_t first = 0; first < rows; first += height) {
            const int64_t r = rows - first < height ? rows - first : height, p = side_by_side(kind, (int)r);
            for (int64_t at = start; at < end; at += p) tiles_of[kind](&a, r, first, at, end - at < p ? end - at : p);
        }
    }
}

void neox_linear(const matrix *m, const float *x, float *y, void *scratch, int64_t rows, int threads) {
#pragma omp parallel num_threads(threads)
    neox_product(m, AS_IS, x, y, scratch, rows);
}

/* ---- packing: what layout.py defines, for the finite rows of a weight -------------------------------------------- */

INLINE float largest_of(const float *values, int64_t count) {
    int32_t most = 0;
    for (int64_t k = 0; k < count; k++) {
        int32_t bits = as_bits(values[k]) & INT32_MAX;
        most = bits > most ? bits : most;
    }
    return as_float(most);
}

INLINE floats four_bits(const float *values, float inverse) {
    floats code = within(spread(-8), multiply(load(values), spread(inverse)), spread(7));
    return add(add(code, spread(ROUNDER)), spread(-ROUNDER));
}

/* Codes of one group of a row; returns the scale, bfloat16: of the candidates the one with the least squared error. */
static uint16_t pack_group(const float *values, const float *shares, int candidates, uint8_t *codes) {
    const float largest = largest_of(values, GROUP);
    float least = INFINITY, best = 0;
    uint16_t chosen = 0;
    for (int c = 0; c < candidates; c++) {
        uint16_t stored = to_bf16(largest * shares[c]);
        float scale = as_float((int32_t)((uint32_t)stored << 16)), inverse = isfinite(1 / scale) ? 1 / scale : 0;
        floats sum = zeros();
        for (int k = 0; k < GROUP; k += LANES) {
            floats error = fused(four_bits(values + k, inverse), spread(-scale), load(values + k));
            sum = fused(error, error, sum);
        }
        float lanes[LANES], error = 0;
        store(lanes, sum);
        for (int i = 0; i < LANES; i++) error += lanes[i];
        if (error < least) least = error, best = inverse, chosen = stored;
    }
    for (int k = 0; k < GROUP; k += LANES) {
        float lanes[LANES];
        store(lanes, four_bits(values + k, best));
        for (int i = 0; i < LANES; i++) codes[k + i] = (uint8_t)((int)lanes[i] + 8);
    }
    return chosen;
}

/* `count` rows of a weight from a panel's start on, of `inputs` values; `shares` are what int4 tries. */
void neox_pack(int kind, const float *rows, void *weights, void *scales, int64_t count, int64_t inputs,
               const float *shares, int candidates, int threads) {
    const int64_t groups = (inputs + GROUP - 1) / GROUP, quads = groups * QUADS;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < count; row++) {
        const float *from = rows + row * inputs;
        const int64_t panel = row / LANES, lane = row % LANES;
        if (kind == FP16) {
            uint16_t *to = (uint16_t *)weights + panel * inputs * LANES + lane;
            for (int64_t k = 0; k < inputs; k++) to[k * LANES] = _cvtss_sh(from[k], _MM_FROUND_TO_NEAREST_INT);
        } else if (kind == BF16 || kind == W16A16) {
            uint16_t *to = (uint16_t *)weights + (panel * ((inputs + 1) / 2) * LANES + lane) * 2;
            for (int64_t k = 0; k < inputs; k++) to[k / 2 * LANES * 2 + k % 2] = to_bf16(from[k]);
        } else if (kind == FP32) {
            float *to = (float *)weights + panel * inputs * LANES + lane;
            for (int64_t k = 0; k < inputs; k++) to[k * LANES] = from[k];
        } else if (kind == INT8) {
            int8_t *to = (int8_t *)weights + (panel * quads * LANES + lane) * 4;
            const float scale = largest_of(from, inputs) / 127;
            ((float *)scales)[row] = scale;
            for (int64_t k = 0; k < inputs; k++)
                to[k / 4 * LANES * 4 + k % 4] = scale > 0 ? (int8_t)as_bits(from[k] / scale + ROUNDER) : 0;
        } else {
            for (int64_t g = 0; g < groups; g++) {
                const int64_t left = inputs - g * GROUP, at = panel * groups + g;
                float values[GROUP] = {0};
                uint8_t codes[GROUP], *to = (uint8_t *)weights + (at * QUADS / 2 * LANES + lane) * 4;
                memcpy(values, from + g * GROUP, (left < GROUP ? left : GROUP) * sizeof(float));
                ((uint16_t *)scales)[at * LANES + lane] = pack_group(values, shares, candidates, codes);
                for (int k = 0; k < GROUP; k += 8)
                    for (int i = 0; i < 4; i++) to[k / 8 * LANES * 4 + i] = codes[k + i] | codes[k + 4 + i] << 4;
            }
        }
    }
}
