/* 16 floats, 16 integers: what the kernels compute with, on AVX-512 VNNI (and BF16) or on AVX2 with FMA and F16C. */

#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16 };

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE float as_float(int32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
INLINE int32_t as_bits(float value) { int32_t bits; memcpy(&bits, &value, 4); return bits; }
/* The nearest bfloat16, halves to even; nan stays one. */
INLINE uint16_t to_bf16(float value) {
    uint32_t bits = (uint32_t)as_bits(value), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & INT32_MAX) > 0x7f800000 ? 0x7fc0 : rounded);
}

/* Adding it rounds a small value to a whole number, halves to even, and leaves that in the low bits. */
#define ROUNDER 12582912.0f /* 3 * 2^22 */

#ifdef __AVX512VNNI__

typedef __m512 floats;
typedef __m512i integers;

INLINE floats zeros(void) { return _mm512_setzero_ps(); }
INLINE floats spread(float value) { return _mm512_set1_ps(value); }
INLINE floats load(const float *from) { return _mm512_loadu_ps(from); }
INLINE void store(float *to, floats v) { _mm512_storeu_ps(to, v); }
INLINE floats add(floats a, floats b) { return _mm512_add_ps(a, b); }
INLINE floats divide(floats a, floats b) { return _mm512_div_ps(a, b); }
INLINE floats larger(floats a, floats b) { return _mm512_max_ps(a, b); }
INLINE floats multiply(floats a, floats b) { return _mm512_mul_ps(a, b); }
INLINE floats fused(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE floats within(floats low, floats v, floats high) { return _mm512_min_ps(_mm512_max_ps(v, low), high); }
INLINE floats from_fp16(const uint16_t *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
INLINE floats from_bf16(const uint16_t *from) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE floats where_negative(floats v, floats yes, floats no) {
    return _mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(_mm512_castps_si512(v), _mm512_setzero_si512()), no, yes);
}
/* 2^n for the whole number n that adding ROUNDER has left in the low bits. */
INLINE floats power_of_two(floats rounded) {
    __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(rounded), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f800000)));
}
INLINE __m256 halves_added(floats v) {
    __m256 low = _mm512_castps512_ps256(v);
    return _mm256_add_ps(low, _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
}
INLINE integers spread_integer(int32_t value) { return _mm512_set1_epi32(value); }
INLINE integers add_integers(integers a, integers b) { return _mm512_add_epi32(a, b); }
INLINE floats to_floats(integers v) { return _mm512_cvtepi32_ps(v); }
/* 16 pairs of bfloat16 that were loaded as they are: the low half of each, and the high one. */
INLINE floats low16(floats pairs) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16));
}
INLINE floats high16(floats pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), _mm512_set1_epi32(-65536)));
}

/* The instruction multiplies unsigned by signed bytes: weights are shifted, and sums start at -SHIFT8 sum(x). */
enum { SHIFT8 = 128 };
INLINE integers weights8(const uint8_t *from) {
    return _mm512_xor_si512(_mm512_loadu_si512(from), _mm512_set1_epi8(-128));
}
INLINE integers low4(const uint8_t *from) { return _mm512_and_si512(_mm512_loadu_si512(from), _mm512_set1_epi8(15)); }
INLINE integers high4(const uint8_t *from) {
    return _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(from), 4), _mm512_set1_epi8(15));
}
/* As the intrinsic, which makes gcc 12 copy every sum to and fro. */
INLINE integers dot8(integers sum, integers w, integers x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
}
INLINE integers dot4(integers sum, integers low, integers high, integers even, integers odd) {
    return dot8(dot8(sum, low, even), high, odd);
}

#else

typedef struct { __m256 a, b; } floats;
typedef struct { __m256i a, b; } integers;

INLINE floats zeros(void) { return (floats){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE floats spread(float value) { return (floats){_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
INLINE floats load(const float *from) { return (floats){_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
INLINE void store(float *to, floats v) { _mm256_storeu_ps(to, v.a), _mm256_storeu_ps(to + 8, v.b); }
INLINE floats add(floats a, floats b) { return (floats){_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
INLINE floats divide(floats a, floats b) { return (floats){_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
INLINE floats larger(floats a, floats b) { return (floats){_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
INLINE floats multiply(floats a, floats b) { return (floats){_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
INLINE floats fused(floats a, floats b, floats c) {
    return (floats){_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
}
INLINE floats within(floats low, floats v, floats high) {
    return (floats){_mm256_min_ps(_mm256_max_ps(v.a, low.a), high.a), _mm256_min_ps(_mm256_max_ps(v.b, low.b), high.b)};
}
INLINE floats from_fp16(const uint16_t *from) {
    const __m128i *half = (const __m128i *)from;
    return (floats){_mm256_cvtph_ps(_mm_loadu_si128(half)), _mm256_cvtph_ps(_mm_loadu_si128(half + 1))};
}
INLINE __m256 shifted(const __m128i *from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(from)), 16));
}
INLINE floats from_bf16(const uint16_t *from) {
    return (floats){shifted((const __m128i *)from), shifted((const __m128i *)from + 1)};
}
INLINE floats where_negative(floats v, floats yes, floats no) {
    return (floats){_mm256_blendv_ps(no.a, yes.a, v.a), _mm256_blendv_ps(no.b, yes.b, v.b)};
}
/* 2^n for the whole number n that adding ROUNDER has left in the low bits. */
INLINE __m256 eight_powers(__m256 rounded) {
    __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(rounded), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f800000)));
}
INLINE floats power_of_two(floats rounded) { return (floats){eight_powers(rounded.a), eight_powers(rounded.b)}; }
INLINE __m256 halves_added(floats v) { return _mm256_add_ps(v.a, v.b); }
INLINE integers spread_integer(int32_t value) { return (integers){_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
INLINE integers add_integers(integers a, integers b) {
    return (integers){_mm256_add_epi32(a.a, b.a), _mm256_add_epi32(a.b, b.b)};
}
INLINE __m256 low_of_eight(__m256 pairs) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16));
}
INLINE __m256 high_of_eight(__m256 pairs) {
    return _mm256_and_ps(pairs, _mm256_castsi256_ps(_mm256_set1_epi32(-65536)));
}
INLINE floats low16(floats pairs) { return (floats){low_of_eight(pairs.a), low_of_eight(pairs.b)}; }
INLINE floats high16(floats pairs) { return (floats){high_of_eight(pairs.a), high_of_eight(pairs.b)}; }
INLINE floats to_floats(integers v) { return (floats){_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }

/* Products of unsigned by signed bytes are added in pairs of 16 bits: |w| <= 127 and |x| <= 127 cannot overflow there,
   nor can four nibbles. */
enum { SHIFT8 = 0 };
INLINE integers weights8(const uint8_t *from) {
    return (integers){_mm256_loadu_si256((const __m256i *)from), _mm256_loadu_si256((const __m256i *)from + 1)};
}
INLINE integers low4(const uint8_t *from) {
    integers w = weights8(from);
    __m256i mask = _mm256_set1_epi8(15);
    return (integers){_mm256_and_si256(w.a, mask), _mm256_and_si256(w.b, mask)};
}
INLINE integers high4(const uint8_t *from) {
    integers w = weights8(from);
    __m256i mask = _mm256_set1_epi8(15);
    return (integers){_mm256_and_si256(_mm256_srli_epi16(w.a, 4), mask),
                      _mm256_and_si256(_mm256_srli_epi16(w.b, 4), mask)};
}
INLINE __m256i widened(__m256i sum, __m256i pairs) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE __m256i signed_pairs(__m256i w, __m256i x) {
    return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}
INLINE integers dot8(integers sum, integers w, integers x) {
    return (integers){widened(sum.a, signed_pairs(w.a, x.a)), widened(sum.b, signed_pairs(w.b, x.b))};
}
INLINE __m256i nibble_pairs(__m256i low, __m256i high, __m256i even, __m256i odd) {
    return _mm256_add_epi16(_mm256_maddubs_epi16(low, even), _mm256_maddubs_epi16(high, odd));
}
INLINE integers dot4(integers sum, integers low, integers high, integers even, integers odd) {
    return (integers){widened(sum.a, nibble_pairs(low.a, high.a, even.a, odd.a)),
                      widened(sum.b, nibble_pairs(low.b, high.b, even.b, odd.b))};
}

#endif

/* ---- on either --------------------------------------------------------------------------------------------------- */

/* sum + a b over the pairs of bfloat16 in a and b, the high halves first: the instruction's order. */
INLINE floats dot16(floats a, floats b, floats sum) {
#ifdef __AVX512BF16__
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
#else
    return fused(low16(a), low16(b), fused(high16(a), high16(b), sum));
#endif
}

INLINE float total(floats v) {
    __m256 eight = halves_added(v);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* The totals of eight sums of eight. */
INLINE __m256 eight_totals(const __m256 *v) {
    __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

/* The first `count` values; zeros after them. */
INLINE floats load_some(const float *from, int64_t count) {
    float lanes[LANES] = {0};
    if (count >= LANES) return load(from);
    memcpy(lanes, from, count * sizeof(float));
    return load(lanes);
}

INLINE void store_some(float *to, floats v, int64_t count) {
    float lanes[LANES];
    if (count >= LANES) { store(to, v); return; }
    store(lanes, v);
    memcpy(to, lanes, count * sizeof(float));
}
