/* The blocks of a GPT-NeoX decoder over new tokens of several sequences, in one call: what lies between the products
   costs a loop, not an operation of torch's.

   Every row (a token) is computed by itself, in an order of sums that depends on nothing but its own position: what
   else is in the batch, where a prompt was cut and how many threads there are does not change a bit. Keys and values
   lie in blocks of POSITIONS, [layer, head, block, position, dim]; a sequence's table says which blocks are its own. */

#include "panels.h"

#include <omp.h>

enum { POSITIONS = 16, TILE = 4 };
#ifdef __AVX512VNNI__
enum { PART = 64 }; /* of a head's values: a tile's sums stay in registers */
#else
enum { PART = 16 };
#endif

typedef struct {
    matrix qkv, dense, up, down;
    const float *norm, *norm_bias;     /* before attention */
    const float *second, *second_bias; /* before the MLP; null: it reads what attention reads */
    int64_t local;                     /* sees `window` positions only */
} block;

typedef struct {
    const block *blocks;
    const float *norm, *norm_bias; /* the final one */
    const float *cos, *sin;        /* [position, rotary / 2] */
    int64_t layers, hidden, heads, head_dim, rotary, ffn, window;
    int64_t parallel; /* residual: x + attention(norm(x)) + mlp(second(x)) */
    int64_t function; /* GELU or GELU_TANH */
    double eps, scale;
} decoder;

typedef struct {
    const int64_t *positions; /* [rows] */
    const int64_t *tables;    /* [rows]: where in `owned` a row's sequence begins */
    const int32_t *owned;     /* numbers of blocks */
    float *keys, *values;     /* of all layers */
    int64_t blocks;           /* in the pool */
} cache;

typedef struct {
    float *normed, *second, *qkv, *attended, *projected, *inner, *fed, *scores;
    int64_t *begins; /* of tiles of rows */
    void *product;
} memory;

static int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

/* Lays out scratch memory; returns its size in floats, without `product`. */
static int64_t divide_memory(const decoder *d, int64_t rows, int64_t longest, int threads, float *from, memory *to) {
    float **places[] = {&to->normed, &to->second, &to->qkv, &to->attended, &to->projected, &to->inner, &to->fed,
                        &to->scores};
    const int64_t width = d->heads * d->head_dim;
    const int64_t sizes[] = {rows * d->hidden, rows * d->hidden, rows * 3 * width, rows * width, rows * d->hidden,
                             rows * d->ffn, rows * d->hidden, threads * TILE * padded(longest)};
    int64_t at = 0;
    for (int i = 0; i < 8; at += padded(sizes[i++])) *places[i] = from + at;
    to->begins = (int64_t *)(from + at);
    at += padded(2 * (rows + 1));
    to->product = from + at;
    return at;
}

/* Bytes of scratch memory that `neox_decode` wants for sequences of up to `longest` positions. */
int64_t neox_decoder_scratch(const decoder *d, int64_t rows, int64_t longest, int threads) {
    memory unused;
    int64_t product = 0;
    for (int64_t i = 0; i < d->layers; i++) {
        const matrix *all[] = {&d->blocks[i].qkv, &d->blocks[i].dense, &d->blocks[i].up, &d->blocks[i].down};
        for (int j = 0; j < 4; j++) {
            int64_t own = neox_scratch((int)all[j]->kind, rows, all[j]->inputs);
            product = own > product ? own : product;
        }
    }
    return product + 4 * divide_memory(d, rows, longest, threads, 0, &unused);
}

static void add_to(float *x, const float *y, int64_t count) {
    for (int64_t k = 0; k < count; k++) x[k] += y[k];
}

static void turn(float *x, const float *cos, const float *sin, int64_t half) {
    for (int64_t k = 0; k < half; k++) {
        const float first = x[k], second = x[half + k];
        x[k] = first * cos[k] - second * sin[k];
        x[half + k] = second * cos[k] + first * sin[k];
    }
}

/* Up to TILE queries of one sequence, at positions first, first + 1, ..: they read each key and value together. */
typedef struct {
    const float *q, *keys, *values; /* q [count, stride]; keys and values of a head, all blocks */
    const int32_t *owned;
    int64_t count, first, window, stride, room;
    float scale;
    float *scores; /* [TILE, room] */
    float *out;    /* [count, width] */
    int64_t width;
} queries;

INLINE int64_t first_seen(const queries *a, int64_t i) {
    return a->window && a->first + i >= a->window ? a->first + i - a->window + 1 : 0;
}
INLINE const float *row_of(const queries *a, const float *rows, int64_t dim, int64_t s) {
    return rows + (a->owned[s / POSITIONS] * POSITIONS + s % POSITIONS) * dim;
}

/* sum[i] += weight of query i for position s times its value, a part of it. */
INLINE void weigh(const queries *a, int64_t dim, int64_t part, int64_t vectors, int64_t from, int64_t to, int64_t start,
                  int64_t s, floats sum[TILE][PART / LANES]) {
    const float *value = row_of(a, a->values, dim, s) + part;
    UNROLL for (int64_t k = 0; k < vectors; k++) {
        const floats v = load_some(value + k * LANES, dim - part - k * LANES);
        UNROLL for (int64_t i = from; i < to; i++)
            sum[i][k] = fused(spread(a->scores[i * a->room + s - start]), v, sum[i][k]);
    }
}

/* Whether other queries are beside it or not, one's sums run over its positions in their order, and over no other's. */
INLINE void attend(const queries *a, int64_t dim, int64_t count) {
    const int64_t start = first_seen(a, 0) / POSITIONS * POSITIONS, last = a->first + count - 1;
    const int64_t end = (last / POSITIONS + 1) * POSITIONS;
    float inverse[TILE];
    for (int64_t at = start; at < end; at += POSITIONS) {
        __m256 sums[TILE][POSITIONS];
        for (int64_t p = 0; p < POSITIONS; p++) {
            const float *key = row_of(a, a->keys, dim, at + p);
            UNROLL for (int64_t i = 0; i < count; i++) {
                floats sum = zeros();
                UNROLL for (int64_t k = 0; k < dim; k += LANES)
                    sum = fused(load_some(a->q + i * a->stride + k, dim - k), load_some(key + k, dim - k), sum);
                sums[i][p] = halves_added(sum);
            }
        }
        for (int64_t i = 0; i < count; i++) {
            float *scores = a->scores + i * a->room + at - start;
            _mm256_storeu_ps(scores, eight_totals(sums[i]));
            _mm256_storeu_ps(scores + 8, eight_totals(sums[i] + 8));
            store(scores, multiply(load(scores), spread(a->scale)));
        }
    }
    for (int64_t i = 0; i < count; i++) {
        float *scores = a->scores + i * a->room;
        const int64_t from = first_seen(a, i) - start, to = a->first + i - start; /* what else was read does not count */
        for (int64_t s = 0; s < from; s++) scores[s] = -INFINITY;
        for (int64_t s = to + 1; s < end - start; s++) scores[s] = -INFINITY;
        /* A whole number of blocks from a block's beginning on, as if the query were alone. */
        const int64_t own = from / POSITIONS * POSITIONS, stop = (to / POSITIONS + 1) * POSITIONS;
        inverse[i] = 1 / exponentials(scores + own, stop - own, from - own, to - own);
    }
    const int64_t common = first_seen(a, count - 1);
    for (int64_t part = 0; part < dim; part += PART) {
        const int64_t left = dim - part < PART ? dim - part : PART, vectors = (left + LANES - 1) / LANES;
        floats sum[TILE][PART / LANES];
        UNROLL for (int64_t i = 0; i < count; i++) UNROLL for (int64_t k = 0; k < vectors; k++) sum[i][k] = zeros();
        for (int64_t i = 0; i < count - 1; i++)
            for (int64_t s = first_seen(a, i); s < common && s <= a->first + i; s++)
                weigh(a, dim, part, vectors, i, i + 1, start, s, sum);
        for (int64_t s = common; s <= a->first; s++) weigh(a, dim, part, vectors, 0, count, start, s, sum);
        for (int64_t i = 1; i < count; i++) {
            const int64_t after = a->first + 1 > common ? a->first + 1 : common;
            for (int64_t s = after; s <= a->first + i; s++) weigh(a, dim, part, vectors, i, i + 1, start, s, sum);
        }
        for (int64_t i = 0; i < count; i++)
            UNROLL for (int64_t k = 0; k < vectors; k++)
                store_some(a->out + i * a->width + part + k * LANES, multiply(sum[i][k], spread(inverse[i])),
                           left - k * LANES);
    }
}

/* The head widths of the family as constants, for a whole tile and for one query: their loops unroll. */
static void attend_any(const queries *a, int64_t dim) {
#define WIDTH(constant) \
    case constant: \
        if (a->count == TILE) attend(a, constant, TILE); \
        else if (a->count == 1) attend(a, constant, 1); \
        else attend(a, constant, a->count); \
        return;
    switch (dim) { WIDTH(64) WIDTH(80) WIDTH(96) WIDTH(128) WIDTH(256) }
    attend(a, dim, a->count);
}

/* Where each tile of rows begins, and where the last one ends; returns how many there are. */
static int64_t cut(const cache *c, int64_t rows, int64_t *begins) {
    int64_t tiles = 0;
    for (int64_t row = 0; row < rows; row++) {
        int fits = row && row - begins[tiles - 1] < TILE && c->tables[row] == c->tables[row - 1]
                && c->positions[row] == c->positions[row - 1] + 1;
        if (!fits) begins[tiles++] = row;
    }
    begins[tiles] = rows;
    return tiles;
}

/* One thread's share of attention's part of a block: rotate, keep keys and values, attend. */
static void attention(const decoder *d, const cache *c, int64_t layer, int64_t rows, int64_t tiles, memory *m,
                      float *scores, int64_t room) {
    const int64_t dim = d->head_dim, width = d->heads * dim, half = d->rotary / 2, stride = c->blocks * POSITIONS * dim;
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < d->heads * rows; unit++) {
        const int64_t head = unit / rows, row = unit % rows, position = c->positions[row];
        float *q = m->qkv + row * 3 * width + head * 3 * dim, *k = q + dim, *v = k + dim;
        if (half) {
            turn(q, d->cos + position * half, d->sin + position * half, half);
            turn(k, d->cos + position * half, d->sin + position * half, half);
        }
        const int64_t own = c->owned[c->tables[row] + position / POSITIONS] * POSITIONS + position % POSITIONS;
        const int64_t at = (layer * d->heads + head) * stride + own * dim;
        memcpy(c->keys + at, k, dim * sizeof(float));
        memcpy(c->values + at, v, dim * sizeof(float));
    }
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < d->heads * tiles; unit++) {
        const int64_t head = unit / tiles, row = m->begins[unit % tiles];
        const int64_t at = (layer * d->heads + head) * stride;
        const queries a = {
            .q = m->qkv + row * 3 * width + head * 3 * dim, .stride = 3 * width,
            .keys = c->keys + at, .values = c->values + at, .owned = c->owned + c->tables[row],
            .count = m->begins[unit % tiles + 1] - row, .first = c->positions[row],
            .window = d->blocks[layer].local ? d->window : 0, .scale = (float)d->scale,
            .scores = scores, .room = room, .out = m->attended + row * width + head * dim, .width = width};
        attend_any(&a, dim);
    }
}

/* x [rows, hidden], embedded tokens, becomes the final hidden states; keys and values are kept in the cache. */
void neox_decode(const decoder *d, const cache *c, float *x, float *out, int64_t rows, int64_t longest, void *scratch,
                 int threads) {
    memory whole;
    divide_memory(d, rows, longest, threads, scratch, &whole);
    const int64_t C = d->hidden, tiles = cut(c, rows, whole.begins), room = padded(longest);
    const float eps = (float)d->eps;
#pragma omp parallel num_threads(threads)
    {
        memory m = whole;
        float *scores = m.scores + omp_get_thread_num() * TILE * room;
        for (int64_t layer = 0; layer < d->layers; layer++) {
            const block *b = d->blocks + layer;
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; row++) {
                normalize(x + row * C, b->norm, b->norm_bias, eps, C, m.normed + row * C);
                if (d->parallel && b->second)
                    normalize(x + row * C, b->second, b->second_bias, eps, C, m.second + row * C);
            }
            neox_product(&b->qkv, AS_IS, m.normed, m.qkv, m.product, rows);
            attention(d, c, layer, rows, tiles, &m, scores, room);
            neox_product(&b->dense, AS_IS, m.attended, m.projected, m.product, rows);
            if (!d->parallel) {
#pragma omp for schedule(static)
                for (int64_t row = 0; row < rows; row++) {
                    add_to(x + row * C, m.projected + row * C, C);
                    normalize(x + row * C, b->second, b->second_bias, eps, C, m.second + row * C);
                }
            }
            neox_product(&b->up, AS_IS, b->second ? m.second : m.normed, m.inner, m.product, rows);
            neox_product(&b->down, (int)d->function, m.inner, m.fed, m.product, rows);
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; row++) {
                if (d->parallel) add_to(m.fed + row * C, m.projected + row * C, C);
                add_to(x + row * C, m.fed + row * C, C);
                if (layer == d->layers - 1) normalize(x + row * C, d->norm, d->norm_bias, eps, C, out + row * C);
            }
        }
    }
}
