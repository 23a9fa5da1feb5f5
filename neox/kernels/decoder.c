/* The blocks of a GPT-NeoX decoder over new tokens of several sequences, in one call: what lies between the products
   costs a loop, not an operation of torch's.

   Every row (a token) is computed by itself, in an order of sums that depends on nothing but its own position: what
   else is in the batch, where a prompt was cut and how many threads there are does not change a bit. Keys and values
   lie in blocks of POSITIONS, [layer, head, block, position, dim]; a sequence's table says which blocks are its own. */

#include "panels.h"

enum { POSITIONS = 16 };

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
    void *product;
} memory;

static int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

/* Lays out scratch memory; returns its size in floats, without `product`. */
static int64_t divide_memory(const decoder *d, int64_t rows, int64_t longest, int threads, float *from, memory *to) {
    float **places[] = {&to->normed, &to->second, &to->qkv, &to->attended, &to->projected, &to->inner, &to->fed,
                        &to->scores};
    const int64_t width = d->heads * d->head_dim;
    const int64_t sizes[] = {rows * d->hidden, rows * d->hidden, rows * 3 * width, rows * width, rows * d->hidden,
                             rows * d->ffn, rows * d->hidden, threads * padded(longest)};
    int64_t at = 0;
    for (int i = 0; i < 8; at += padded(sizes[i++])) *places[i] = from + at;
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

/* to = (x - mean) / sqrt(variance + eps) * weight + bias, of one row. */
static void normalize(const float *x, const float *weight, const float *bias, float eps, int64_t width, float *to) {
    floats sum = zeros(), squares = zeros();
    for (int64_t k = 0; k < width; k += LANES) sum = add(sum, load_some(x + k, width - k));
    const float mean = total(sum) / width;
    for (int64_t k = 0; k < width; k += LANES) {
        floats off = add(load_some(x + k, width - k), spread(-mean));
        if (width - k < LANES) { /* what is beyond the row is no deviation */
            float lanes[LANES];
            store(lanes, off);
            off = load_some(lanes, width - k);
        }
        squares = fused(off, off, squares);
    }
    const float inverse = 1 / sqrtf(total(squares) / width + eps);
    for (int64_t k = 0; k < width; k += LANES) {
        floats off = add(load_some(x + k, width - k), spread(-mean));
        floats scaled = multiply(multiply(off, spread(inverse)), load_some(weight + k, width - k));
        store_some(to + k, bias ? add(scaled, load_some(bias + k, width - k)) : scaled, width - k);
    }
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

/* Attention of one query [dim] over positions `from` .. `to` of its sequence; `scores` has room for them all. */
INLINE void attend(int64_t dim, const float *q, const float *keys, const float *values, const int32_t *owned,
                   int64_t from, int64_t to, float scale, float *scores, float *out) {
    const int64_t start = from / POSITIONS * POSITIONS, end = (to / POSITIONS + 1) * POSITIONS;
    enum { MOST = 16 }; /* vectors of a head that stay in registers */
    float most = -INFINITY;
    for (int64_t s = start; s < end; s++) scores[s - start] = -INFINITY;
    for (int64_t s = from; s <= to; s++) {
        const float *key = keys + (owned[s / POSITIONS] * POSITIONS + s % POSITIONS) * dim;
        floats sum = zeros();
        UNROLL for (int64_t k = 0; k < dim; k += LANES)
            sum = fused(load_some(q + k, dim - k), load_some(key + k, dim - k), sum);
        const float score = total(sum) * scale;
        scores[s - start] = score;
        most = score > most ? score : most;
    }
    floats all = zeros();
    for (int64_t s = 0; s < end - start; s += LANES) {
        floats weight = exponential(add(load(scores + s), spread(-most)));
        store(scores + s, weight);
        if (s == 0) for (int64_t k = 0; k < from - start; k++) scores[k] = 0;
        if (s == end - start - LANES) for (int64_t k = to + 1; k < end; k++) scores[k - start] = 0;
        all = add(all, load(scores + s));
    }
    const float inverse = 1 / total(all);
    for (int64_t part = 0; part < dim; part += MOST * LANES) {
        const int64_t width = dim - part < MOST * LANES ? dim - part : MOST * LANES;
        floats sum[MOST];
        UNROLL for (int64_t k = 0; k < width; k += LANES) sum[k / LANES] = zeros();
        for (int64_t s = from; s <= to; s++) {
            const float *value = values + (owned[s / POSITIONS] * POSITIONS + s % POSITIONS) * dim + part;
            const floats weight = spread(scores[s - start]);
            UNROLL for (int64_t k = 0; k < width; k += LANES)
                sum[k / LANES] = fused(weight, load_some(value + k, width - k), sum[k / LANES]);
        }
        UNROLL for (int64_t k = 0; k < width; k += LANES)
            store_some(out + part + k, multiply(sum[k / LANES], spread(inverse)), width - k);
    }
}

/* The head widths of the family as constants: their loops unroll. */
static void attend_any(int64_t dim, const float *q, const float *keys, const float *values, const int32_t *owned,
                       int64_t from, int64_t to, float scale, float *scores, float *out) {
#define WIDTH(constant) \
    case constant: attend(constant, q, keys, values, owned, from, to, scale, scores, out); return;
    switch (dim) { WIDTH(64) WIDTH(80) WIDTH(96) WIDTH(128) WIDTH(256) }
    attend(dim, q, keys, values, owned, from, to, scale, scores, out);
}

/* One thread's share of attention's part of a block: rotate, keep keys and values, attend. */
static void attention(const decoder *d, const cache *c, int64_t layer, int64_t rows, memory *m, float *scores) {
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
    for (int64_t unit = 0; unit < d->heads * rows; unit++) {
        const int64_t head = unit / rows, row = unit % rows, to = c->positions[row];
        const int64_t from = d->blocks[layer].local && to >= d->window ? to - d->window + 1 : 0;
        const int64_t at = (layer * d->heads + head) * stride;
        attend_any(dim, m->qkv + row * 3 * width + head * 3 * dim, c->keys + at, c->values + at,
                   c->owned + c->tables[row], from, to, (float)d->scale, scores, m->attended + row * width + head * dim);
    }
}

/* x [rows, hidden], embedded tokens, becomes the final hidden states; keys and values are kept in the cache. */
void neox_decode(const decoder *d, const cache *c, float *x, float *out, int64_t rows, int64_t longest, void *scratch,
                 int threads) {
    memory whole;
    divide_memory(d, rows, longest, threads, scratch, &whole);
    const int64_t C = d->hidden;
    const float eps = (float)d->eps;
#pragma omp parallel num_threads(threads)
    {
        memory m = whole;
#ifdef _OPENMP
        extern int omp_get_thread_num(void);
        float *scores = m.scores + omp_get_thread_num() * padded(longest);
#else
        float *scores = m.scores;
#endif
        for (int64_t layer = 0; layer < d->layers; layer++) {
            const block *b = d->blocks + layer;
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; row++) {
                normalize(x + row * C, b->norm, b->norm_bias, eps, C, m.normed + row * C);
                if (d->parallel && b->second)
                    normalize(x + row * C, b->second, b->second_bias, eps, C, m.second + row * C);
            }
            neox_product(&b->qkv, AS_IS, m.normed, m.qkv, m.product, rows);
            attention(d, c, layer, rows, &m, scores);
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
