/* Functions of single values and of rows: exponential, GELU, softmax, layer norm. docs/weights.md has their errors. */

#pragma once

#include "vectors.h"

enum { AS_IS, GELU, GELU_TANH }; /* what happens to x before it enters a product */

/* e^x within 2 units in the last place; x is cut to -87 .. 88. Taylor's series of e^r for |r| <= ln(2) / 2. */
INLINE floats exponential(floats x) {
    x = within(spread(-87), x, spread(88));
    floats rounded = fused(x, spread(1.44269504f), spread(ROUNDER)), whole = add(rounded, spread(-ROUNDER));
    floats r = fused(whole, spread(-1.42860677e-6f), fused(whole, spread(-0.693145752f), x)); /* ln 2 in two parts */
    floats sum = spread(1 / 5040.0f);
    sum = fused(sum, r, spread(1 / 720.0f));
    sum = fused(sum, r, spread(1 / 120.0f));
    sum = fused(sum, r, spread(1 / 24.0f));
    sum = fused(sum, r, spread(1 / 6.0f));
    sum = fused(sum, r, spread(0.5f));
    sum = fused(sum, r, spread(1));
    sum = fused(sum, r, spread(1));
    return multiply(sum, power_of_two(rounded));
}

/* What enters a product of an MLP: v times the normal distribution's function, by erfc(z) = t e^(-z^2) P(t) for
   t = 1 / (1 + z / 2) and P fitted within 5e-8; or that with tanh, v / (1 + e^(-2 sqrt(2 / pi) (v + 0.044715 v^3))). */
INLINE floats activated(int function, floats v) {
    if (function == GELU_TANH) {
        floats cube = multiply(multiply(v, v), v), inner = fused(cube, spread(0.044715f), v);
        return divide(v, add(spread(1), exponential(multiply(inner, spread(-1.59576912f)))));
    }
    static const float fit[] = {-0.0586365445f, 0.282454269f,  -0.482781866f, 0.272976035f, -0.0230881581f,
                                0.201174647f,   0.243490698f,  0.282321328f,  0.282089551f};
    floats z = multiply(v, spread(0.707106781f));
    z = larger(z, multiply(z, spread(-1)));
    floats t = divide(spread(1), fused(z, spread(0.5f), spread(1))), sum = spread(fit[0]);
    UNROLL for (int i = 1; i < 9; i++) sum = fused(sum, t, spread(fit[i]));
    floats tail = multiply(multiply(sum, t), multiply(spread(0.5f), exponential(multiply(z, multiply(z, spread(-1))))));
    return multiply(v, where_negative(v, tail, add(spread(1), multiply(tail, spread(-1)))));
}

/* scores [count], a multiple of LANES, become e^(score - the largest) from position `from` to position `to`, and 0
   beyond them, where they are -infinity; returns the sum. */
static float exponentials(float *scores, int64_t count, int64_t from, int64_t to) {
    floats most = spread(-INFINITY), all = zeros();
    for (int64_t s = 0; s < count; s += LANES) most = larger(most, load(scores + s));
    float lanes[LANES], highest = -INFINITY;
    store(lanes, most);
    for (int k = 0; k < LANES; k++) highest = lanes[k] > highest ? lanes[k] : highest;
    for (int64_t s = 0; s < count; s += LANES) {
        store(scores + s, exponential(add(load(scores + s), spread(-highest))));
        for (int64_t k = s; k < from; k++) scores[k] = 0;
        for (int64_t k = to + 1; k < s + LANES; k++) scores[k] = 0;
        all = add(all, load(scores + s));
    }
    return total(all);
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
