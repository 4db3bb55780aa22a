// Arithmetic on vectors that attention needs: sums over lanes, exp, tanh, parts of vectors.

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kAccumulators = 16;  // of 32 registers
#else
constexpr int kAccumulators = 8;  // of 16 registers
#endif

constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// n <= kLanes numbers, and 0 beyond.
inline Vec load_some(const float* from, int64_t n) {
  if (n >= kLanes) return load<Vec>(from);
  float some[kLanes] = {};
  std::memcpy(some, from, n * sizeof(float));
  return load<Vec>(some);
}

// widen_bytes for n < kLanes of them, and 0 beyond.
inline VecI widen_some_bytes(const uint8_t* from, int64_t n) {
  uint8_t some[kLanes] = {};
  std::memcpy(some, from, n);
  return widen_bytes(some);
}

// kLanes numbers of half precision.
inline Vec widen_float16(const uint16_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX__) && defined(__F16C__)
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = half_to_float(from[i]);
  return x;
#endif
}

inline Vec widen_bfloat16(const uint16_t* from) {
  const VecI bits = widen_halves(from) << 16;
  return load<Vec>(&bits);
}

template <int kFirst, int... I>
inline Vec every_other(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return shuffle(a, b, std::integer_sequence<int, (2 * I + kFirst)...>{});
}

// Lanes kFirst, kFirst + 2, ... of the concatenation (a, b).
template <int kFirst>
inline Vec every_other(Vec a, Vec b) {
  return every_other<kFirst>(a, b, std::make_integer_sequence<int, kLanes>{});
}

template <int kStep, int... I>
inline Vec fold(Vec a, Vec b, std::integer_sequence<int, I...>) {
  Vec low = shuffle(a, b, std::integer_sequence<int, ((I & kStep) ? kLanes + I - kStep : I)...>{});
  Vec high = shuffle(a, b, std::integer_sequence<int, ((I & kStep) ? kLanes + I : I + kStep)...>{});
  return low + high;
}

// One level of the reduction tree below.
template <int kStep>
inline void fold_all(Vec* v) {
  if constexpr (kStep < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2 * kStep)
      v[i] = fold<kStep>(v[i], v[i + kStep], std::make_integer_sequence<int, kLanes>{});
    fold_all<kStep * 2>(v);
  }
}

// Lane i of the result is the sum of the lanes of v[i]: kLanes horizontal sums for kLanes - 1 folds.
inline Vec lane_sums(Vec* v) {
  fold_all<1>(v);
  return v[0];
}

inline float lane_max(Vec x) {
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

inline float lane_sum(Vec x) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

inline float sum_of(const float* from, int64_t n) {
  Vec sum{};
  for (int64_t i = 0; i < n; i += kLanes) sum += load_some(from + i, n - i);
  return lane_sum(sum);
}

// exp(x) for x <= 0 to about 1 ulp (the polynomial of Cephes expf); exactly 0 below the normal range, NaN for NaN.
inline Vec exp_nonpositive(Vec x) {
  const Vec rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const VecI underflow = x < splat(-87.3f);
  Vec t = x * 1.44269504088896341f + rounder;
  Vec n = t - rounder;
  Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n from its exponent bits: t holds n in its low bits.
  VecI power = (load<VecI>(&t) - load<VecI>(&rounder) + 127) << 23;
  return underflow ? Vec{} : p * load<Vec>(&power);
}

// tanh(x) to a few ulp: a quotient of polynomials that reaches 1 at the bound (the coefficients are Eigen's).
inline Vec tanh_of(Vec x) {
  const Vec bound = splat(7.90531110763549805f);
  x = x > bound ? bound : x;  // not min and max: NaN passes
  x = x < -bound ? -bound : x;
  const Vec x2 = x * x;
  Vec p = splat(-2.76076847742355e-16f);
  p = p * x2 + 2.00018790482477e-13f;
  p = p * x2 - 8.60467152213735e-11f;
  p = p * x2 + 5.12229709037114e-08f;
  p = p * x2 + 1.48572235717979e-05f;
  p = p * x2 + 6.37261928875436e-04f;
  p = p * x2 + 4.89352455891786e-03f;
  Vec q = splat(1.19825839466702e-06f);
  q = q * x2 + 1.18534705686654e-04f;
  q = q * x2 + 2.26843463243900e-03f;
  q = q * x2 + 4.89352518554385e-03f;
  return x * p / q;
}

}  // namespace
