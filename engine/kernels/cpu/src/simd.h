// Vectors of 16 float or int32 lanes and of 64 bytes, with the same names on every code path.
//
// Lanes hold independent results wherever possible, so the order of additions does not depend on the width of the
// machine's registers.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

// For functions called for each vector: in a unit as large as these, the compiler stops inlining by itself.
#define INLINE inline __attribute__((always_inline))
// For longer functions that many instances of a template call, which would multiply the time to compile.
#define NOT_INLINE __attribute__((noinline))

namespace {

constexpr int LANES = 16;

INLINE constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

INLINE int32_t load_int32(const void* p) {
    int32_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

INLINE float load_float(const void* p) {
    float value;
    memcpy(&value, p, sizeof value);
    return value;
}

INLINE float half_to_float(uint16_t half) { return _cvtsh_ss(half); }
INLINE uint16_t float_to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

INLINE float bfloat16_to_float(uint16_t value) {
    uint32_t bits = uint32_t(value) << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

INLINE uint16_t float_to_bfloat16(float value) {  // to nearest, ties to even; a NaN stays a NaN
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#ifdef __AVX512F__

constexpr int NUM_REGISTERS = 32;

struct Floats { __m512 v; };
struct Ints { __m512i v; };
struct Bytes { __m512i v; };

INLINE __mmask16 first(int64_t n) { return __mmask16((1u << n) - 1); }

INLINE Floats zero() { return {_mm512_setzero_ps()}; }
INLINE Floats fill(float x) { return {_mm512_set1_ps(x)}; }
INLINE Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
// The first n lanes. Whole vectors need no mask, which would delay the next load of a masked store.
INLINE Floats load_some(const float* p, int64_t n) {
    return n >= LANES ? load(p) : Floats{_mm512_maskz_loadu_ps(first(n), p)};
}
INLINE void store(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
// Writes around the caches. `p` is aligned to 64 bytes.
INLINE void stream(float* p, Floats x) { _mm512_stream_ps(p, x.v); }
INLINE void store_some(float* p, Floats x, int64_t n) {
    if (n >= LANES) store(p, x);
    else _mm512_mask_storeu_ps(p, first(n), x.v);
}
INLINE Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE Floats maximum(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE Floats minimum(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE Floats absolute(Floats a) { return {_mm512_abs_ps(a.v)}; }
// a where x < y, else b
INLINE Floats where_less(Floats x, Floats y, Floats a, Floats b) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ), b.v, a.v)};
}
INLINE uint32_t less_mask(Floats x, Floats y) { return _mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ); }
INLINE uint32_t equal_mask(Floats x, Floats y) { return _mm512_cmp_ps_mask(x.v, y.v, _CMP_EQ_OQ); }

INLINE Ints zero_ints() { return {_mm512_setzero_si512()}; }
INLINE Ints fill_ints(int32_t x) { return {_mm512_set1_epi32(x)}; }
INLINE Ints load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
INLINE void store_ints(int32_t* p, Ints x) { _mm512_storeu_si512(p, x.v); }
INLINE Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
INLINE Ints operator*(Ints a, Ints b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
INLINE Ints maximum(Ints a, Ints b) { return {_mm512_max_epi32(a.v, b.v)}; }
INLINE Ints operator^(Ints a, Ints b) { return {_mm512_xor_si512(a.v, b.v)}; }
INLINE Ints operator&(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
template <int N> INLINE Ints shift_left(Ints a) { return {_mm512_slli_epi32(a.v, N)}; }
template <int N> INLINE Ints shift_right(Ints a) { return {_mm512_srli_epi32(a.v, N)}; }  // logical
INLINE Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
INLINE Ints to_nearest(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }
INLINE Floats as_floats(Ints a) { return {_mm512_castsi512_ps(a.v)}; }
INLINE Ints as_ints(Floats a) { return {_mm512_castps_si512(a.v)}; }
INLINE Ints as_ints(Bytes a) { return {a.v}; }
INLINE Ints operator|(Ints a, Ints b) { return {_mm512_or_si512(a.v, b.v)}; }

INLINE Floats load_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
INLINE Floats load_bfloat16(const uint16_t* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
INLINE Floats load_int8(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
INLINE Ints load_uint8(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
INLINE void store_int8(int8_t* p, Ints x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x.v)); }
INLINE void store_bfloat16_bits(uint16_t* p, Ints x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(x.v)); }

INLINE Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
// Moves the WIDTH bits of each byte from bit FROM on to bit TO and clears the others.
template <int WIDTH, int FROM, int TO> INLINE Bytes move_bits(Bytes x) {
    constexpr int LEFT = TO > FROM ? TO - FROM : 0, RIGHT = FROM > TO ? FROM - TO : 0;
    if (LEFT) x = {_mm512_slli_epi16(x.v, LEFT)};
    if (RIGHT) x = {_mm512_srli_epi16(x.v, RIGHT)};
    return {_mm512_and_si512(x.v, _mm512_set1_epi8(((1 << WIDTH) - 1) << TO))};
}
template <int TO> INLINE Bytes spread_bits(const uint8_t* p) {  // 64 bits -> 64 bytes, each with one of them as bit TO
    uint64_t bits;
    memcpy(&bits, p, sizeof bits);
    return {_mm512_maskz_mov_epi8(bits, _mm512_set1_epi8(1 << TO))};
}
INLINE Bytes look_up(Bytes x, const uint8_t (&table)[16]) {  // table[x] for each byte below 16
    return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), x.v)};
}
INLINE Bytes operator|(Bytes a, Bytes b) { return {_mm512_or_si512(a.v, b.v)}; }

// Adds to each int32 lane the product of its four unsigned bytes with the four signed bytes of `four`.
template <int BITS> INLINE Ints dot(Ints sum, Bytes codes, int32_t four) {
    return {_mm512_dpbusd_epi32(sum.v, codes.v, _mm512_set1_epi32(four))};
}

// Adds to each float lane the product of its pair of bfloat16 with another pair.
#ifdef __AVX512BF16__
INLINE Floats dot_pairs(Floats sum, Ints a, Ints b) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
}
#else
INLINE Floats dot_pairs(Floats sum, Ints a, Ints b) {
    const Ints high = fill_ints(int32_t(0xffff0000));
    sum = multiply_add(as_floats(a & high), as_floats(b & high), sum);
    return multiply_add(as_floats(shift_left<16>(a)), as_floats(shift_left<16>(b)), sum);
}
#endif

INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
INLINE void prefetch_to_l2(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

#else  // AVX2: two registers make one vector

constexpr int NUM_REGISTERS = 16;

struct Floats { __m256 a, b; };
struct Ints { __m256i a, b; };
struct Bytes { __m256i a, b; };

INLINE __m256i first_eight(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int32_t(max_of(n, 0))), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

INLINE Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE Floats fill(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE Floats load_some(const float* p, int64_t n) {
    if (n >= LANES) return load(p);
    return {_mm256_maskload_ps(p, first_eight(n)), n > 8 ? _mm256_maskload_ps(p + 8, first_eight(n - 8)) : _mm256_setzero_ps()};
}
INLINE void store(float* p, Floats x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
INLINE void stream(float* p, Floats x) { _mm256_stream_ps(p, x.a); _mm256_stream_ps(p + 8, x.b); }
INLINE void store_some(float* p, Floats x, int64_t n) {
    if (n >= LANES) return store(p, x);
    _mm256_maskstore_ps(p, first_eight(n), x.a);
    if (n > 8) _mm256_maskstore_ps(p + 8, first_eight(n - 8), x.b);
}
INLINE Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE Floats operator-(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE Floats operator/(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE Floats multiply_add(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
INLINE Floats maximum(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE Floats minimum(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INLINE Floats absolute(Floats x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
INLINE Floats where_less(Floats x, Floats y, Floats a, Floats b) {
    return {_mm256_blendv_ps(b.a, a.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(b.b, a.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
INLINE uint32_t less_mask(Floats x, Floats y) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ))) |
           uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))) << 8;
}
INLINE uint32_t equal_mask(Floats x, Floats y) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_EQ_OQ))) |
           uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_EQ_OQ))) << 8;
}

INLINE Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE Ints fill_ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE Ints load_ints(const int32_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
INLINE void store_ints(int32_t* p, Ints x) {
    _mm256_storeu_si256((__m256i*)p, x.a);
    _mm256_storeu_si256((__m256i*)(p + 8), x.b);
}
INLINE Ints operator+(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INLINE Ints operator*(Ints x, Ints y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
INLINE Ints maximum(Ints x, Ints y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
INLINE Ints operator^(Ints x, Ints y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
INLINE Ints operator&(Ints x, Ints y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
template <int N> INLINE Ints shift_left(Ints x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }
template <int N> INLINE Ints shift_right(Ints x) { return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)}; }
INLINE Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE Ints to_nearest(Floats x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
INLINE Floats as_floats(Ints x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
INLINE Ints as_ints(Floats x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }

INLINE Floats load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
INLINE Floats load_bfloat16(const uint16_t* p) {
    return as_floats(shift_left<16>(Ints{_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
                                         _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 8)))}));
}
INLINE Floats load_int8(const int8_t* p) {
    __m128i x = _mm_loadu_si128((const __m128i*)p);
    return to_floats(Ints{_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))});
}
INLINE Ints load_uint8(const uint8_t* p) {
    __m128i x = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
INLINE __m128i low_words(Ints x) {  // the low 16 bits of lanes 0..7 and 8..15, as two halves of one register each
    const __m256i low = _mm256_set1_epi32(0xffff);
    __m256i packed = _mm256_packus_epi32(_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low));
    packed = _mm256_permute4x64_epi64(packed, 0xd8);
    const __m256i low_byte = _mm256_set1_epi16(0xff);
    packed = _mm256_packus_epi16(_mm256_and_si256(packed, low_byte), _mm256_setzero_si256());
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0xd8));
}
INLINE void store_int8(int8_t* p, Ints x) { _mm_storeu_si128((__m128i*)p, low_words(x)); }
INLINE void store_bfloat16_bits(uint16_t* p, Ints x) {
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8));
}

INLINE Bytes load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
template <int WIDTH, int FROM, int TO> INLINE Bytes move_bits(Bytes x) {
    constexpr int LEFT = TO > FROM ? TO - FROM : 0, RIGHT = FROM > TO ? FROM - TO : 0;
    if (LEFT) x = {_mm256_slli_epi16(x.a, LEFT), _mm256_slli_epi16(x.b, LEFT)};
    if (RIGHT) x = {_mm256_srli_epi16(x.a, RIGHT), _mm256_srli_epi16(x.b, RIGHT)};
    const __m256i mask = _mm256_set1_epi8(((1 << WIDTH) - 1) << TO);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
template <int TO> INLINE __m256i spread_32_bits(const uint8_t* p) {
    const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit_of = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(load_int32(p)), byte_of);
    __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit_of), bit_of);
    return _mm256_and_si256(is_set, _mm256_set1_epi8(1 << TO));
}
template <int TO> INLINE Bytes spread_bits(const uint8_t* p) { return {spread_32_bits<TO>(p), spread_32_bits<TO>(p + 4)}; }
INLINE Bytes look_up(Bytes x, const uint8_t (&table)[16]) {
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
    return {_mm256_shuffle_epi8(both, x.a), _mm256_shuffle_epi8(both, x.b)};
}
INLINE Bytes operator|(Bytes x, Bytes y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }

// Products of bytes are added in pairs that saturate at 16 bits. Codes of up to 7 bits cannot reach that; a code of 8
// bits is split into its upper seven bits, counted twice, and the lowest bit.
INLINE __m256i dot_seven_bits(__m256i codes, __m256i four) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, four), _mm256_set1_epi16(1));
}
template <int BITS> INLINE __m256i dot_eight(__m256i sum, __m256i codes, __m256i four) {
    if (BITS < 8) return _mm256_add_epi32(sum, dot_seven_bits(codes, four));
    __m256i upper = _mm256_and_si256(_mm256_srli_epi16(codes, 1), _mm256_set1_epi8(127));
    __m256i lowest = _mm256_and_si256(codes, _mm256_set1_epi8(1));
    sum = _mm256_add_epi32(sum, _mm256_slli_epi32(dot_seven_bits(upper, four), 1));
    return _mm256_add_epi32(sum, dot_seven_bits(lowest, four));
}
template <int BITS> INLINE Ints dot(Ints sum, Bytes codes, int32_t four) {
    __m256i all = _mm256_set1_epi32(four);
    return {dot_eight<BITS>(sum.a, codes.a, all), dot_eight<BITS>(sum.b, codes.b, all)};
}
INLINE Floats dot_pairs(Floats sum, Ints a, Ints b) {
    const Ints high = fill_ints(int32_t(0xffff0000));
    sum = multiply_add(as_floats(a & high), as_floats(b & high), sum);
    return multiply_add(as_floats(shift_left<16>(a)), as_floats(shift_left<16>(b)), sum);
}

INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
INLINE void prefetch_to_l2(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

#endif

// Stores bfloat16, rounded to nearest, ties to even. Returns the stored numbers.
INLINE Floats store_rounded(uint16_t* p, Floats x) {
#ifdef __AVX512BF16__
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(x.v);
    _mm256_storeu_si256((__m256i*)p, rounded);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16))};
#else
    const Ints bits = as_ints(x), odd = shift_right<16>(bits) & fill_ints(1);
    // Rounding could turn a NaN into a number. Doubling instead keeps infinities and makes NaNs quiet.
    const Floats nearest = as_floats(bits + fill_ints(0x7fff) + odd);
    const Ints rounded = as_ints(where_less(absolute(x), fill(__builtin_inff()), nearest, x + x));
    store_bfloat16_bits(p, shift_right<16>(rounded));
    return as_floats(rounded & fill_ints(int32_t(0xffff0000)));
#endif
}

INLINE void store_bfloat16(uint16_t* p, Floats x) { store_rounded(p, x); }

// Sums and maxima over lanes, always in the same tree: halves, quarters, ...
#ifdef __AVX512F__
INLINE __m256 low_half(Floats x) { return _mm512_castps512_ps256(x.v); }
INLINE __m256 high_half(Floats x) { return _mm512_extractf32x8_ps(x.v, 1); }
INLINE __m256i low_half(Ints x) { return _mm512_castsi512_si256(x.v); }
INLINE __m256i high_half(Ints x) { return _mm512_extracti32x8_epi32(x.v, 1); }
#else
INLINE __m256 low_half(Floats x) { return x.a; }
INLINE __m256 high_half(Floats x) { return x.b; }
INLINE __m256i low_half(Ints x) { return x.a; }
INLINE __m256i high_half(Ints x) { return x.b; }
#endif

INLINE float sum_of_lanes(Floats x) {
    __m256 eight = _mm256_add_ps(low_half(x), high_half(x));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

INLINE float max_of_lanes(Floats x) {
    __m256 eight = _mm256_max_ps(low_half(x), high_half(x));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

INLINE int32_t sum_of_lanes(Ints x) {
    __m256i eight = _mm256_add_epi32(low_half(x), high_half(x));
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
}

// Sums and maxima of four integer vectors at once, in four lanes. With integers the order does not matter.
INLINE __m128i sums_of_lanes(Ints a, Ints b, Ints c, Ints d) {
    __m256i ab = _mm256_hadd_epi32(_mm256_add_epi32(low_half(a), high_half(a)), _mm256_add_epi32(low_half(b), high_half(b)));
    __m256i cd = _mm256_hadd_epi32(_mm256_add_epi32(low_half(c), high_half(c)), _mm256_add_epi32(low_half(d), high_half(d)));
    __m256i abcd = _mm256_hadd_epi32(ab, cd);
    return _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1));
}

INLINE __m256i max_of_halves(Ints x) { return _mm256_max_epi32(low_half(x), high_half(x)); }

INLINE __m128i maxima_of_lanes(Ints a, Ints b, Ints c, Ints d) {
    __m256i a8 = max_of_halves(a), b8 = max_of_halves(b), c8 = max_of_halves(c), d8 = max_of_halves(d);
    __m256i ab = _mm256_max_epi32(_mm256_unpacklo_epi32(a8, b8), _mm256_unpackhi_epi32(a8, b8));
    __m256i cd = _mm256_max_epi32(_mm256_unpacklo_epi32(c8, d8), _mm256_unpackhi_epi32(c8, d8));
    __m256i abcd = _mm256_max_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
    return _mm_max_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1));
}

// e^x to about one unit in the last place; exactly 0 below -87 and for -infinity; at most e^88; NaN for NaN.
INLINE Floats exponential(Floats x) {
    const Floats lowest = fill(-87.0f);
    Floats bounded = minimum(fill(88.0f), maximum(lowest, x));  // in this order a NaN stays a NaN
    Ints n = to_nearest(bounded * fill(1.44269504088896341f));
    Floats whole = to_floats(n);
    Floats r = multiply_add(whole, fill(-0.693359375f), bounded);
    r = multiply_add(whole, fill(2.12194440e-4f), r);
    Floats p = fill(1.9875691500e-4f);
    p = multiply_add(p, r, fill(1.3981999507e-3f));
    p = multiply_add(p, r, fill(8.3334519073e-3f));
    p = multiply_add(p, r, fill(4.1665795894e-2f));
    p = multiply_add(p, r, fill(1.6666665459e-1f));
    p = multiply_add(p, r, fill(5.0000001201e-1f));
    p = multiply_add(p, r * r, r + fill(1.0f));
    Floats power = as_floats(shift_left<23>(n + fill_ints(127)));
    return where_less(x, lowest, zero(), p * power);
}

// Natural logarithm of positive normal numbers, to about one unit in the last place, with the polynomial of Cephes.
inline Floats logarithm(Floats x) {
    const Ints lowest = fill_ints(0x3f3504f3);  // sqrt(1/2): the mantissa is reduced to sqrt(1/2)..sqrt(2)
    const Ints bits = as_ints(x) + fill_ints(0x3f800000 - 0x3f3504f3);
    const Floats exponent = to_floats(shift_right<23>(bits) + fill_ints(-127));
    const Floats f = as_floats((bits & fill_ints(0x7fffff)) + lowest) - fill(1.0f);
    Floats p = fill(7.0376836292e-2f);
    p = multiply_add(p, f, fill(-1.1514610310e-1f));
    p = multiply_add(p, f, fill(1.1676998740e-1f));
    p = multiply_add(p, f, fill(-1.2420140846e-1f));
    p = multiply_add(p, f, fill(1.4249322787e-1f));
    p = multiply_add(p, f, fill(-1.6668057665e-1f));
    p = multiply_add(p, f, fill(2.0000714765e-1f));
    p = multiply_add(p, f, fill(-2.4999993993e-1f));
    p = multiply_add(p, f, fill(3.3333331174e-1f));
    const Floats square = f * f;
    Floats rest = f * square * p;
    rest = multiply_add(exponent, fill(-2.12194440e-4f), rest);
    rest = multiply_add(square, fill(-0.5f), rest);
    return multiply_add(exponent, fill(0.693359375f), f + rest);
}

// 2^x with a relative error of about 1e-4, for weights that are rounded to bfloat16; x at most 127; exactly 0 from -127
// down and for -infinity; NaN for NaN.
INLINE Floats rough_power_of_two(Floats x) {
    const Floats shift = fill(12582912.0f);  // 3 * 2^22: a number added to it is rounded, and the low bits hold the integer
    Floats bounded = maximum(fill(-127.0f), x);
    Floats shifted = bounded + shift;
    Floats r = bounded - (shifted - shift);
    Floats p = multiply_add(fill(5.50090578e-2f), r, fill(2.42210975e-1f));
    p = multiply_add(p, r, fill(6.93282898e-1f));
    p = multiply_add(p, r, fill(1.0f));
    return as_floats(as_ints(p) + shift_left<23>(as_ints(shifted)));
}

INLINE Floats tanh_of(Floats x) {  // 1 - 2 / (e^2x + 1)
    return fill(1.0f) - fill(2.0f) / (exponential(x + x) + fill(1.0f));
}

}  // namespace
