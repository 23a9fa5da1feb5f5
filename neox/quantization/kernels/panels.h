/* Products with weights in panels, for one thread of a team: see panels.c. */

#pragma once

#include "functions.h"

typedef struct {
    int64_t kind, outputs, inputs;
    const void *weights, *scales;
    const float *bias; /* [outputs], or null */
} matrix;

int64_t neox_scratch(int kind, int64_t rows, int64_t inputs);

/* y [rows, outputs] = function(x [rows, inputs]) @ weights^T + bias. Every thread of a parallel region calls it alike;
   they share the work, and all of it is done when one returns. */
void neox_product(const matrix *m, int function, const float *x, float *y, void *scratch, int64_t rows);
