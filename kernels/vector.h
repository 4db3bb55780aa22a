// SIMD helpers of the CPU kernels. cpp_common.py joins this text and that of a kernel to one source.
//
// Vectors are those of GCC and Clang, as wide as a register, so the same source serves AVX-512, AVX2, NEON and plain
// SSE. Inductor's flags switch loop vectorization off, so plain loops would stay scalar. Intrinsics stand only where
// GCC 12 takes the portable form apart into scalars.

#ifndef MIKV_VECTOR_H
#define MIKV_VECTOR_H

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint8_t VecB __attribute__((vector_size(kLanes)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));

template <class T, class S>
inline T load(const S* from) {
  T x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

template <class T, class S>
inline void store(S* to, T x) {
  std::memcpy(to, &x, sizeof(x));
}

inline Vec splat(float x) { return x - Vec{}; }

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// ---------------------------------------------------------------------------------------------------------------------
// Between integers of 8, 16 and 32 bits.

inline VecI widen_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecI>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<VecI>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(load<VecB>(from), VecI);
#endif
}

inline VecI widen_halves(const uint16_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecI>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<VecI>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(load<VecH>(from), VecI);
#endif
}

// Numbers from 0 to 255.
inline void narrow_to_bytes(uint8_t* to, VecI x) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(x)));
#elif defined(__AVX2__)
  const __m256i wide = reinterpret_cast<__m256i>(x);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(halves, halves));
#else
  store(to, __builtin_convertvector(x, VecB));
#endif
}

// Numbers from 0 to 65535.
inline void narrow_to_halves(uint16_t* to, VecU x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x)));
#elif defined(__AVX2__)
  const __m256i wide = reinterpret_cast<__m256i>(x);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
#else
  store(to, __builtin_convertvector(x, VecH));
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Lanes.

// Lane i of the result is lane I[i] of the concatenation (a, b).
template <int... I>
inline Vec shuffle(Vec a, Vec b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, VecI{I...});
#endif
}

template <int kStep, int... I>
inline Vec swap_lanes(Vec x, std::integer_sequence<int, I...>) {
  return shuffle(x, x, std::integer_sequence<int, (I ^ kStep)...>{});
}

// All lanes joined by an associative and commutative operation.
template <int kStep = 1, class Op>
inline float join_lanes(Vec x, const Op& op) {
  if constexpr (kStep < kLanes)
    return join_lanes<kStep * 2>(op(x, swap_lanes<kStep>(x, std::make_integer_sequence<int, kLanes>{})), op);
  else
    return x[0];
}

// ---------------------------------------------------------------------------------------------------------------------
// Half precision. Floats are rounded to the nearest, ties to even, as torch does.

inline float half_to_float(uint16_t h) {
  // Rebiasing by a multiplication is right for subnormals, too; infinities and NaNs need the float exponent 255.
  uint32_t bits = static_cast<uint32_t>(h & 0x7fff) << 13;
  float x = load<float>(&bits) * 0x1p112f;
  uint32_t result = load<uint32_t>(&x);
  if ((h & 0x7c00) == 0x7c00) result |= 0x7f800000u;
  result |= static_cast<uint32_t>(h & 0x8000) << 16;
  return load<float>(&result);
}

inline uint16_t float_to_half(float x) {
  uint32_t bits = load<uint32_t>(&x);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  uint32_t result;
  if (bits >= 0x47800000u) {  // 65536 and above
    result = bits > 0x7f800000u ? 0x7e00 : 0x7c00;
  } else if (bits < 0x38800000u) {
    // Subnormal: the last place of numbers from 0.5 on is that of subnormal halves, so the sum is rounded as needed.
    const float sum = load<float>(&bits) + 0.5f;
    result = load<uint32_t>(&sum) - 0x3f000000u;
  } else {
    result = (bits + 0xfff + (bits >> 13 & 1) - 0x38000000u) >> 13;  // a carry leads to the next exponent, or infinity
  }
  return static_cast<uint16_t>(sign | result);
}

inline float bfloat_to_float(uint16_t h) {
  uint32_t bits = static_cast<uint32_t>(h) << 16;
  return load<float>(&bits);
}

inline uint16_t float_to_bfloat(float x) {
  const uint32_t bits = load<uint32_t>(&x);
  return static_cast<uint16_t>(x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void halves_to_floats(const uint16_t* from, int64_t n, float* to) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
#endif
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) to[i] = half_to_float(from[i]);
}

inline void floats_to_halves(const float* from, int64_t n, uint16_t* to) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) to[i] = float_to_half(from[i]);
}

inline void bfloats_to_floats(const uint16_t* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, widen_halves(from + i) << 16);
  for (; i < n; ++i) to[i] = bfloat_to_float(from[i]);
}

inline void floats_to_bfloats(const float* from, int64_t n, uint16_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec x = load<Vec>(from + i);
    const VecU bits = load<VecU>(from + i);
    const VecU rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    narrow_to_halves(to + i, x != x ? VecU{} + 0x7fc0 : rounded);
  }
  for (; i < n; ++i) to[i] = float_to_bfloat(from[i]);
}

}  // namespace

#endif
