// Attention over the tiers of a mixed-precision KV store, on the CPU. Called by cpp_attention.py through ctypes.
//
// One work item is (batch row, KV head, block of query rows, range of slots). It walks its slots in tiles of kTile:
// keys of a tile are dequantized to float32 in L1, multiplied with the block's rows, the online softmax updates the
// running maximum and sum, and the values of the tile are dequantized to the same place and accumulated. The query
// heads of a KV head are packed as rows (row = head_in_group * R + r), so that a tile is dequantized once for all of
// them. Ranges are merged by log-sum-exp. How the slots are cut into ranges depends on shapes alone, so the result has
// the same bits for any number of threads.
//
// SIMD is written with the vector extensions of GCC and Clang, not with intrinsics: the same source serves AVX-512,
// AVX2, NEON and plain SSE. Inductor's flags switch loop vectorization off, so plain loops would stay scalar.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Arguments: arrays of 8-byte fields, written by cpp_attention.py in this order.

// How one side stores its numbers. Coded sides have the width of a code as their kind.
enum Kind : int64_t { kFloat32 = 32, kFloat16 = 16, kBFloat16 = 17 };
enum MaskKind : int64_t { kNoMask = 0, kBoolMask = 1, kFloatMask = 2 };

// Keys or values of one tier. Strides count elements.
struct Side {
  int64_t kind;
  int64_t tokens;    // consecutive slots that share a scale
  int64_t channels;  // neighbouring channels that share a scale
  const uint8_t* codes;
  int64_t batch_stride, head_stride, slot_stride;
  const uint16_t* scales;  // float16; null when kind is a floating-point one
  const uint16_t* zeros;   // float16, strides of `scales`
  int64_t param_batch_stride, param_head_stride, param_block_stride;
};

struct Tier {
  Side key, value;
  const int32_t* positions;  // null: slot i has position first_position + i
  int64_t position_batch_stride, position_head_stride;
  int64_t first_position;
  int64_t count;     // slots in use; nothing beyond them is read
  int64_t balanced;  // keys are stored multiplied by the balancer
};

struct Call {
  const float* q;  // [B, H_kv, G * R, D_k]
  float* out;      // [B, H_kv, G * R, D_v]
  float* lse;      // [B, H_kv, G * R]
  const float* balancer;  // [B, H_kv, D_k] or null
  int64_t batch, kv_heads, group, rows, key_dim, value_dim;
  int64_t threads;
  int64_t mask_kind;
  const uint8_t* mask;  // [B, H_q, R, positions] of bool or float32
  int64_t mask_batch_stride, mask_head_stride, mask_row_stride, mask_column_stride;
  int64_t num_tiers;
  Tier tiers[1];  // num_tiers of them; the last one is the call's own tokens
};
static_assert(sizeof(void*) == 8, "arguments are passed as 8-byte fields");
static_assert(sizeof(Side) == 12 * 8 && sizeof(Tier) == 30 * 8, "layout is mirrored in cpp_attention.py");

// ---------------------------------------------------------------------------------------------------------------------
// Vectors of the widest register.

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kAccumulators = 16;  // of 32 registers
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kAccumulators = 8;  // of 16 registers
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kAccumulators = 16;  // of 32 registers
#else
constexpr int kLanes = 4;
constexpr int kAccumulators = 8;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint8_t VecB __attribute__((vector_size(kLanes)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));

constexpr int64_t kTile = 64;      // slots; a float32 tile of 128 channels takes 32 KiB
constexpr int64_t kSlotPad = 16;   // scores are computed for multiples of this many slots
constexpr int64_t kRowBlock = 32;  // query rows that share one dequantized tile
constexpr int64_t kItems = 64;     // work items to aim for: some balance between threads, few partial results
constexpr int64_t kMinSplit = 256; // slots below which a range of its own does not pay
constexpr int kMaxRows = kAccumulators >= 16 ? 4 : 2;  // query rows in registers at a time
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

static_assert(kSlotPad % kLanes == 0 && kTile % kSlotPad == 0, "softmax works on whole vectors of scores");

template <class T, class S>
inline T load(const S* from) {
  T x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof(x)); }

inline Vec splat(float x) { return x - Vec{}; }

// kLanes unsigned integers of 8 or 16 bits as int32. (GCC 12 takes the portable form apart into scalars.)
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

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

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

// ---------------------------------------------------------------------------------------------------------------------
// Half precision.

inline float half_to_float(uint16_t h) {
  // Rebiasing by a multiplication is right for subnormals, too; infinities and NaNs need the float exponent 255.
  uint32_t bits = static_cast<uint32_t>(h & 0x7fff) << 13;
  float x = load<float>(&bits) * 0x1p112f;
  uint32_t result = load<uint32_t>(&x);
  if ((h & 0x7c00) == 0x7c00) result |= 0x7f800000u;
  result |= static_cast<uint32_t>(h & 0x8000) << 16;
  return load<float>(&result);
}

inline float bfloat_to_float(uint16_t h) {
  uint32_t bits = static_cast<uint32_t>(h) << 16;
  return load<float>(&bits);
}

void halves_to_floats(const uint16_t* from, int64_t n, float* to) {
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

void bfloats_to_floats(const uint16_t* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    VecI bits = widen_halves(from + i) << 16;
    store(to + i, load<Vec>(&bits));
  }
  for (; i < n; ++i) to[i] = bfloat_to_float(from[i]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Codes. A row consists of planes of `width` channels: channel c = plane * width + j has its bits in byte j of the row
// (3 bits: the low two in byte (plane % 2) * width + j of the 2-bit part, the third in byte j of the 1-bit part).

constexpr int planes_of(int bits) { return bits == 3 ? 8 : 8 / bits; }

// Codes of channels j, j + 1, ... of a plane (T = VecI), or of channel j alone (T = int32_t).
template <int kBits, class T>
inline T codes_at(const uint8_t* row, int64_t plane, int64_t width, int64_t j) {
  auto bytes = [](const uint8_t* from) {
    if constexpr (std::is_same_v<T, VecI>)
      return widen_bytes(from);
    else
      return static_cast<T>(*from);
  };
  if constexpr (kBits == 8) return bytes(row + j);
  if constexpr (kBits == 4 || kBits == 2) {
    const int shift = static_cast<int>(plane) * kBits;
    return (bytes(row + j) >> shift) & ((1 << kBits) - 1);
  }
  if constexpr (kBits == 3) {
    const int low_shift = static_cast<int>(plane >> 1) * 2, high_shift = static_cast<int>(plane);
    T low = (bytes(row + (plane & 1) * width + j) >> low_shift) & 3;
    return low | (((bytes(row + 2 * width + j) >> high_shift) & 1) << 2);
  }
}

// A run of neighbouring channels that lie in one plane and share one scale.
struct Run {
  int64_t plane;
  int64_t begin;  // first byte within the plane
  int64_t group;
  int32_t mask;   // selects the code's bits where they are
  float factor;   // and this puts them into place: 2^-shift, folded into the scale, is exact and saves the shift
};

// Scratch memory of one thread for unpacking.
struct Unpacker {
  float* scales;  // [kTile * dim]: per block of slots and group
  float* zeros;
  float* wide_scales;  // [dim]: one block expanded to channels
  float* wide_zeros;
  Run* runs;  // [dim / kLanes]
};

// Whole vectors per run when a row can be cut into runs of equal length; 0 when it cannot.
int64_t run_vectors(int64_t width, int64_t channels) {
  const int64_t length = std::min(width, channels);
  if (length % kLanes || std::max(width, channels) % length) return 0;
  const int64_t vectors = length / kLanes;
  return vectors % 4 == 0 ? 4 : vectors % 2 == 0 ? 2 : 1;
}

// Unpack n slots, kVecs vectors per run. Each slot's scales lie param_stride after those of the slot before.
template <int kBits, int kVecs>
void unpack_runs(const uint8_t* codes, int64_t code_stride, int64_t n, int64_t dim, const Run* runs,
                 const float* scales, const float* zeros, int64_t param_stride, float* __restrict out,
                 int64_t out_stride) {
  const int64_t width = dim / planes_of(kBits), num_runs = dim / (kVecs * kLanes);
  for (int64_t i = 0; i < n; ++i, scales += param_stride, zeros += param_stride) {
    const uint8_t* __restrict row = codes + i * code_stride;
    float* __restrict to = out + i * out_stride;
    for (int64_t k = 0; k < num_runs; ++k, to += kVecs * kLanes) {
      const Run run = runs[k];
      const Vec zero = splat(zeros[run.group]);
      const Vec step = splat(kBits == 3 ? scales[run.group] : scales[run.group] * run.factor);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const int64_t j = run.begin + v * kLanes;
        VecI code;
        if constexpr (kBits == 3)
          code = codes_at<3, VecI>(row, run.plane, width, j);
        else
          code = widen_bytes(row + j) & run.mask;
        store(to + v * kLanes, __builtin_convertvector(code, Vec) * step + zero);
      }
    }
  }
}

// Unpack n slots that share their scales, given per channel.
template <int kBits>
void unpack_channels(const uint8_t* codes, int64_t code_stride, int64_t n, int64_t dim, const float* scales,
                     const float* zeros, float* __restrict out, int64_t out_stride) {
  constexpr int kPlanes = planes_of(kBits);
  const int64_t width = dim / kPlanes;
  for (int64_t i = 0; i < n; ++i) {
    const uint8_t* __restrict row = codes + i * code_stride;
    float* __restrict to = out + i * out_stride;
#pragma GCC unroll 8
    for (int plane = 0; plane < kPlanes; ++plane) {
      int64_t j = 0, c = plane * width;
      for (; j + kLanes <= width; j += kLanes, c += kLanes) {
        const Vec code = __builtin_convertvector(codes_at<kBits, VecI>(row, plane, width, j), Vec);
        store(to + c, code * load<Vec>(scales + c) + load<Vec>(zeros + c));
      }
      for (; j < width; ++j, ++c)
        to[c] = static_cast<float>(codes_at<kBits, int32_t>(row, plane, width, j)) * scales[c] + zeros[c];
    }
  }
}

// Slots [begin, begin + n) of a coded side to float32 [n, stride].
template <int kBits>
void unpack(const Side& side, const uint8_t* codes, const uint16_t* scales, const uint16_t* zeros, int64_t begin,
            int64_t n, int64_t dim, const Unpacker& scratch, float* out, int64_t stride) {
  const int64_t groups = dim / side.channels, width = dim / planes_of(kBits);
  const int64_t first_block = begin / side.tokens, blocks = (begin + n - 1) / side.tokens - first_block + 1;
  if (side.param_block_stride == groups) {
    halves_to_floats(scales + first_block * groups, blocks * groups, scratch.scales);
    halves_to_floats(zeros + first_block * groups, blocks * groups, scratch.zeros);
  } else {
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t from = (first_block + i) * side.param_block_stride;
      halves_to_floats(scales + from, groups, scratch.scales + i * groups);
      halves_to_floats(zeros + from, groups, scratch.zeros + i * groups);
    }
  }

  const int64_t vectors = run_vectors(width, side.channels);
  if (vectors) {
    for (int64_t c = 0, k = 0; c < dim; c += vectors * kLanes, ++k) {
      const int64_t plane = c / width;
      const int shift = static_cast<int>(plane) * kBits;
      scratch.runs[k] = {plane, c - plane * width, c / side.channels, ((1 << kBits) - 1) << shift,
                         1.0f / static_cast<float>(1 << shift)};
    }
  }

  // Slots go in stretches that share their scales; runs also take slots with scales of their own in one go.
  const bool own_scales = vectors && side.tokens == 1;
  const int64_t param_stride = own_scales ? groups : 0;
  int64_t left = own_scales ? n : side.tokens - begin % side.tokens;  // slots left in the stretch
  for (int64_t i = 0, block = 0; i < n; ++block) {
    const int64_t same = std::min(left, n - i);
    const float* block_scales = scratch.scales + block * groups;
    const float* block_zeros = scratch.zeros + block * groups;
    const uint8_t* from = codes + (begin + i) * side.slot_stride;
    float* to = out + i * stride;
    auto unpack_with = [&](auto count) {
      unpack_runs<kBits, count>(from, side.slot_stride, same, dim, scratch.runs, block_scales, block_zeros,
                                param_stride, to, stride);
    };
    if (vectors == 4) {
      unpack_with(std::integral_constant<int, 4>{});
    } else if (vectors == 2) {
      unpack_with(std::integral_constant<int, 2>{});
    } else if (vectors == 1) {
      unpack_with(std::integral_constant<int, 1>{});
    } else {
      if (side.channels > 1) {
        for (int64_t g = 0; g < groups; ++g) {
          std::fill_n(scratch.wide_scales + g * side.channels, side.channels, block_scales[g]);
          std::fill_n(scratch.wide_zeros + g * side.channels, side.channels, block_zeros[g]);
        }
        block_scales = scratch.wide_scales;
        block_zeros = scratch.wide_zeros;
      }
      unpack_channels<kBits>(from, side.slot_stride, same, dim, block_scales, block_zeros, to, stride);
    }
    i += same;
    left = side.tokens;
  }
}

// A matrix in float32 with whole vectors per row.
struct Matrix {
  const float* data;
  int64_t stride;
};

// Slots [begin, begin + n) of a side as float32 rows of round_up(dim, kLanes) channels (zero beyond dim), followed by
// zero rows up to a multiple of `row_pad`. `tile` is where they are written unless the buffer can be read in place.
Matrix read_tile(const Side& side, int64_t b, int64_t h, int64_t begin, int64_t n, int64_t dim, int64_t row_pad,
                 const Unpacker& scratch, float* tile) {
  const int64_t stride = round_up(dim, kLanes), offset = b * side.batch_stride + h * side.head_stride;
  if (side.kind == kFloat32 && dim == stride && n % row_pad == 0) {
    const float* data = reinterpret_cast<const float*>(side.codes) + offset + begin * side.slot_stride;
    return {data, side.slot_stride};
  }
  const uint8_t* codes = side.codes + offset;
  const int64_t param_offset = b * side.param_batch_stride + h * side.param_head_stride;
  const uint16_t* scales = side.scales + param_offset;
  const uint16_t* zeros = side.zeros + param_offset;
  switch (side.kind) {
    case 8:
      unpack<8>(side, codes, scales, zeros, begin, n, dim, scratch, tile, stride);
      break;
    case 4:
      unpack<4>(side, codes, scales, zeros, begin, n, dim, scratch, tile, stride);
      break;
    case 3:
      unpack<3>(side, codes, scales, zeros, begin, n, dim, scratch, tile, stride);
      break;
    case 2:
      unpack<2>(side, codes, scales, zeros, begin, n, dim, scratch, tile, stride);
      break;
    default:
      for (int64_t i = 0; i < n; ++i) {
        const int64_t from = offset + (begin + i) * side.slot_stride;
        float* to = tile + i * stride;
        if (side.kind == kFloat32)
          std::copy_n(reinterpret_cast<const float*>(side.codes) + from, dim, to);
        else if (side.kind == kFloat16)
          halves_to_floats(reinterpret_cast<const uint16_t*>(side.codes) + from, dim, to);
        else
          bfloats_to_floats(reinterpret_cast<const uint16_t*>(side.codes) + from, dim, to);
      }
  }
  if (dim != stride)
    for (int64_t i = 0; i < n; ++i) std::fill_n(tile + i * stride + dim, stride - dim, 0.0f);
  std::fill_n(tile + n * stride, (round_up(n, row_pad) - n) * stride, 0.0f);
  return {tile, stride};
}

// Ask for the codes of n slots ahead of their use. A tile of codes is about a page long, and hardware prefetchers,
// which stop at page borders, would start anew in every tile.
void prefetch(const Side& side, int64_t b, int64_t h, int64_t begin, int64_t n, int64_t dim) {
  const int64_t size = side.kind == kFloat32 ? 4 : side.kind >= kFloat16 ? 2 : 1;
  const int64_t row_bytes = side.kind >= kFloat16 ? dim * size : dim * side.kind / 8;
  if (side.slot_stride * size != row_bytes) return;  // slots lie apart, as in own tokens of a [B, S, H, D] model
  const uint8_t* from = side.codes + (b * side.batch_stride + h * side.head_stride) * size + begin * row_bytes;
  for (int64_t i = 0; i < n * row_bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// ---------------------------------------------------------------------------------------------------------------------
// The two products.

// Scores of kRows query rows (dim floats each, `dim` a multiple of kLanes) with n key rows, n a multiple of kSlotPad.
template <int kRows>
void score_rows(const float* q, int64_t dim, Matrix keys, int64_t n, float* scores) {
  constexpr int kSlots = std::min(8, kAccumulators / (kRows == 3 ? 4 : kRows));
  constexpr int kSums = (kRows * kSlots + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = 0; i < n; i += kSlots) {
    Vec acc[kSums] = {};
    for (int64_t c = 0; c < dim; c += kLanes) {
      Vec key[kSlots];
#pragma GCC unroll 8
      for (int s = 0; s < kSlots; ++s) key[s] = load<Vec>(keys.data + (i + s) * keys.stride + c);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vec query = load<Vec>(q + r * dim + c);
#pragma GCC unroll 8
        for (int s = 0; s < kSlots; ++s) acc[r * kSlots + s] += query * key[s];
      }
    }
    float sums[kSums];
#pragma GCC unroll 4
    for (int first = 0; first < kSums; first += kLanes) store(sums + first, lane_sums(acc + first));
    for (int r = 0; r < kRows; ++r) std::memcpy(scores + r * kTile + i, sums + r * kSlots, kSlots * sizeof(float));
  }
}

// acc[r] += sum over n slots of weights[r, slot] * values[slot], for kRows rows and kVecs vectors of channels.
template <int kRows, int kVecs>
inline void add_columns(const float* weights, Matrix values, int64_t n, float* acc, int64_t acc_stride) {
  Vec sum[kRows][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) sum[r][i] = load<Vec>(acc + r * acc_stride + i * kLanes);
  for (int64_t slot = 0; slot < n; ++slot) {
    const float* row = values.data + slot * values.stride;
    Vec value[kVecs];
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) value[i] = load<Vec>(row + i * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = splat(weights[r * kTile + slot]);
#pragma GCC unroll 8
      for (int i = 0; i < kVecs; ++i) sum[r][i] += weight * value[i];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) store(acc + r * acc_stride + i * kLanes, sum[r][i]);
}

template <int kRows>
void add_values(const float* weights, Matrix values, int64_t n, int64_t dim, float* acc) {
  constexpr int kVecs = std::min(8, kAccumulators / (kRows == 3 ? 4 : kRows));
  int64_t c = 0;
  for (; c + kVecs * kLanes <= dim; c += kVecs * kLanes)
    add_columns<kRows, kVecs>(weights, {values.data + c, values.stride}, n, acc + c, dim);
  for (; c < dim; c += kLanes) add_columns<kRows, 1>(weights, {values.data + c, values.stride}, n, acc + c, dim);
}

// Calls run(first_row, integral_constant of a number of rows) for blocks of rows that fit the registers.
template <class F>
void for_row_blocks(int64_t rows, F run) {
  int64_t r = 0;
  for (; r + kMaxRows <= rows; r += kMaxRows) run(r, std::integral_constant<int, kMaxRows>{});
  switch (rows - r) {
    case 3:
      run(r, std::integral_constant<int, std::min(3, kMaxRows)>{});
      break;
    case 2:
      run(r, std::integral_constant<int, 2>{});
      break;
    case 1:
      run(r, std::integral_constant<int, 1>{});
      break;
    default:
      break;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Work items.

// How a call is cut into work items; a function of shapes alone.
struct Plan {
  int64_t packed_rows;       // G * R
  int64_t row_blocks;        // per (batch row, KV head)
  int64_t slots;             // of all tiers
  int64_t splits;            // ranges of slots
  int64_t split_slots;       // slots per range, a multiple of kTile
  int64_t key_pad, value_pad;  // channels in whole vectors
  int64_t items;

  explicit Plan(const Call& call) {
    packed_rows = call.group * call.rows;
    row_blocks = (packed_rows + kRowBlock - 1) / kRowBlock;
    key_pad = round_up(call.key_dim, kLanes);
    value_pad = round_up(call.value_dim, kLanes);
    slots = 0;
    for (int64_t t = 0; t < call.num_tiers; ++t) slots += call.tiers[t].count;
    const int64_t blocks = std::max<int64_t>(call.batch * call.kv_heads * row_blocks, 1);
    const int64_t wanted = std::min((kItems + blocks - 1) / blocks, slots / kMinSplit);
    split_slots = round_up((slots + std::max<int64_t>(wanted, 1) - 1) / std::max<int64_t>(wanted, 1), kTile);
    splits = slots ? (slots + split_slots - 1) / split_slots : 1;
    items = call.batch * call.kv_heads * row_blocks * splits;
  }
};

// Memory of one thread, cut from one allocation.
struct Scratch {
  float* q;           // [kRowBlock, key_pad], times scale
  float* q_balanced;  // the same, divided by the balancer
  float* tile;        // [kTile, max(key_pad, value_pad)]
  float* scores;      // [kRowBlock, kTile]
  float* bias;        // [kTile], mask of one query row at the slots of a tile
  float* acc;         // [kRowBlock, value_pad]
  float* max;         // [kRowBlock]
  Vec* sum;           // [kRowBlock], one partial sum per lane
  Unpacker unpacker;

  static constexpr int64_t kRunFloats = sizeof(Run) / sizeof(float);

  static int64_t floats(const Plan& plan) {
    const int64_t dim = std::max(plan.key_pad, plan.value_pad);
    const int64_t unpacking = 2 * kTile * dim + 2 * dim + kRunFloats * dim / kLanes;
    const int64_t n = kRowBlock * (2 * plan.key_pad + plan.value_pad + kTile + 1 + kLanes) + kTile * dim + kTile +
                      unpacking;
    return round_up(n, 1024);  // threads do not share pages or cache lines
  }

  Scratch(const Plan& plan, float* at) {
    const int64_t dim = std::max(plan.key_pad, plan.value_pad);
    auto take = [&at](int64_t n) { return std::exchange(at, at + n); };
    tile = take(kTile * dim);
    q = take(kRowBlock * plan.key_pad);
    q_balanced = take(kRowBlock * plan.key_pad);
    acc = take(kRowBlock * plan.value_pad);
    scores = take(kRowBlock * kTile);
    sum = reinterpret_cast<Vec*>(take(kRowBlock * kLanes));
    bias = take(kTile);
    max = take(kRowBlock);
    unpacker.runs = reinterpret_cast<Run*>(take(kRunFloats * dim / kLanes));
    unpacker.scales = take(kTile * dim);
    unpacker.zeros = take(kTile * dim);
    unpacker.wide_scales = take(dim);
    unpacker.wide_zeros = take(dim);
  }
};

// The mask of one query row at n slots as numbers to add: 0 and -inf for a bool mask.
void gather_mask(const Call& call, const uint8_t* row, const int32_t* positions, int64_t first, int64_t n,
                 float* bias) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = (positions ? positions[i] : first + i) * call.mask_column_stride;
    if (call.mask_kind == kBoolMask)
      bias[i] = row[at] ? 0.0f : kNegInf;
    else
      bias[i] = reinterpret_cast<const float*>(row)[at];
  }
  std::fill_n(bias + n, round_up(n, kSlotPad) - n, kNegInf);
}

// Where the mask of a packed row begins.
const uint8_t* mask_row(const Call& call, int64_t b, int64_t h, int64_t packed_row) {
  const int64_t head = h * call.group + packed_row / call.rows, r = packed_row % call.rows;
  const int64_t at = b * call.mask_batch_stride + head * call.mask_head_stride + r * call.mask_row_stride;
  return call.mask + at * (call.mask_kind == kBoolMask ? 1 : 4);
}

// s = softcap * tanh(s / softcap) for one row's scores of n slots.
void cap_row(float* scores, int64_t n, float softcap) {
  const float inverse = 1.0f / softcap;
  for (int64_t i = 0; i < n; i += kLanes) store(scores + i, tanh_of(load<Vec>(scores + i) * inverse) * softcap);
}

// Turn one row's scores of n slots into weights; keep the running maximum, sum and accumulator in step.
void softmax_row(float* scores, const float* bias, int64_t n, float& row_max, Vec& row_sum, float* acc,
                 int64_t value_pad) {
  const int64_t padded = round_up(n, kSlotPad);
  std::fill(scores + n, scores + padded, kNegInf);
  Vec best = splat(kNegInf);
  for (int64_t i = 0; i < padded; i += kLanes) {
    Vec s = load<Vec>(scores + i);
    if (bias) {
      const Vec add = load<Vec>(bias + i);
      // Not a plain sum: what a masked slot holds must not turn -inf into NaN.
      s = add == splat(kNegInf) ? add : s + add;
      store(scores + i, s);
    }
    best = best > s ? best : s;
  }
  const float before = row_max, now = std::max(before, lane_max(best));
  if (now != before) {
    const float shrink = before == kNegInf ? 0.0f : std::exp(before - now);
    row_sum *= shrink;
    for (int64_t c = 0; c < value_pad; c += kLanes) store(acc + c, load<Vec>(acc + c) * shrink);
    row_max = now;
  }
  const Vec base = splat(now == kNegInf ? 0.0f : now);
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vec weight = exp_nonpositive(load<Vec>(scores + i) - base);
    row_sum += weight;
    store(scores + i, weight);
  }
}

// One tile of one tier: slots [begin, begin + n).
void attend_tile(const Call& call, const Plan& plan, const Tier& tier, int64_t b, int64_t h, int64_t first_row,
                 int64_t rows, int64_t begin, int64_t n, float softcap, const Scratch& mine) {
  const float* q = tier.balanced ? mine.q_balanced : mine.q;
  prefetch(tier.value, b, h, begin, n, call.value_dim);
  const Matrix keys = read_tile(tier.key, b, h, begin, n, call.key_dim, kSlotPad, mine.unpacker, mine.tile);
  for_row_blocks(rows, [&](int64_t r, auto count) {
    score_rows<count>(q + r * plan.key_pad, plan.key_pad, keys, round_up(n, kSlotPad), mine.scores + r * kTile);
  });
  if (softcap != 0.0f)
    for (int64_t r = 0; r < rows; ++r) cap_row(mine.scores + r * kTile, n, softcap);

  const int32_t* positions = tier.positions;
  if (positions) positions += b * tier.position_batch_stride + h * tier.position_head_stride + begin;
  const uint8_t* gathered = nullptr;
  for (int64_t r = 0; r < rows; ++r) {
    if (call.mask_kind != kNoMask) {
      const uint8_t* row = mask_row(call, b, h, first_row + r);
      // The query heads of a group mostly share one mask, and in decoding their rows are neighbours.
      if (row != gathered) gather_mask(call, row, positions, tier.first_position + begin, n, mine.bias);
      gathered = row;
    }
    softmax_row(mine.scores + r * kTile, gathered ? mine.bias : nullptr, n, mine.max[r], mine.sum[r],
                mine.acc + r * plan.value_pad, plan.value_pad);
  }

  prefetch(tier.key, b, h, begin + n, std::min(kTile, tier.count - begin - n), call.key_dim);
  const Matrix values = read_tile(tier.value, b, h, begin, n, call.value_dim, 1, mine.unpacker, mine.tile);
  for_row_blocks(rows, [&](int64_t r, auto count) {
    add_values<count>(mine.scores + r * kTile, values, n, plan.value_pad, mine.acc + r * plan.value_pad);
  });
}

// Write a row's output from its accumulator, maximum and sum.
void finish_row(const Call& call, int64_t row, const float* acc, float max, float sum) {
  const float norm = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (int64_t c = 0; c < call.value_dim; ++c) call.out[row * call.value_dim + c] = acc[c] * norm;
  call.lse[row] = max + std::log(sum);
}

// Per packed row of every (batch row, KV head) and range: maximum, sum and accumulator.
struct Partials {
  float* max;  // [B * H_kv * G * R, splits]
  float* sum;
  float* acc;  // [B * H_kv * G * R, splits, value_pad]
};

void run_item(const Call& call, const Plan& plan, float scale, float softcap, int64_t item, const Scratch& mine,
              const Partials& partials) {
  const int64_t split = item % plan.splits, block = item / plan.splits;
  const int64_t first_row = block % plan.row_blocks * kRowBlock, pair = block / plan.row_blocks;
  const int64_t b = pair / call.kv_heads, h = pair % call.kv_heads;
  const int64_t rows = std::min(kRowBlock, plan.packed_rows - first_row);

  for (int64_t r = 0; r < rows; ++r) {
    const float* from = call.q + (pair * plan.packed_rows + first_row + r) * call.key_dim;
    float* q = mine.q + r * plan.key_pad;
    std::fill_n(q, plan.key_pad, 0.0f);
    for (int64_t c = 0; c < call.key_dim; ++c) q[c] = from[c] * scale;
    if (call.balancer) {
      float* balanced = mine.q_balanced + r * plan.key_pad;
      std::fill_n(balanced, plan.key_pad, 0.0f);
      for (int64_t c = 0; c < call.key_dim; ++c) balanced[c] = q[c] / call.balancer[pair * call.key_dim + c];
    }
    mine.max[r] = kNegInf;
    mine.sum[r] = Vec{};
  }
  std::fill_n(mine.acc, rows * plan.value_pad, 0.0f);

  // The range counts the slots of all tiers in a row.
  int64_t from = split * plan.split_slots, left = std::min(plan.split_slots, plan.slots - from);
  for (int64_t t = 0; t < call.num_tiers && left > 0; ++t) {
    const Tier& tier = call.tiers[t];
    while (from < tier.count && left > 0) {
      const int64_t n = std::min({kTile, left, tier.count - from});
      attend_tile(call, plan, tier, b, h, first_row, rows, from, n, softcap, mine);
      from += n;
      left -= n;
    }
    from = std::max<int64_t>(from - tier.count, 0);
  }

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = pair * plan.packed_rows + first_row + r;
    const float* acc = mine.acc + r * plan.value_pad;
    if (plan.splits == 1) {
      finish_row(call, row, acc, mine.max[r], lane_sum(mine.sum[r]));
    } else {
      partials.max[row * plan.splits + split] = mine.max[r];
      partials.sum[row * plan.splits + split] = lane_sum(mine.sum[r]);
      std::copy_n(acc, plan.value_pad, partials.acc + (row * plan.splits + split) * plan.value_pad);
    }
  }
}

// Merge the ranges of one row by log-sum-exp; the first range's accumulator takes the result.
void merge_row(const Call& call, const Plan& plan, int64_t row, const Partials& partials) {
  const float* max = partials.max + row * plan.splits;
  const float* sum = partials.sum + row * plan.splits;
  float* acc = partials.acc + row * plan.splits * plan.value_pad;
  const float best = *std::max_element(max, max + plan.splits);
  float total = 0.0f;
  for (int64_t s = 0; s < plan.splits; ++s) {
    // best is -inf only if all are, and then every sum is 0.
    const float weight = max[s] == kNegInf ? 0.0f : std::exp(max[s] - best);
    total += weight * sum[s];
    for (int64_t c = 0; c < plan.value_pad; c += kLanes) {
      const Vec part = load<Vec>(acc + s * plan.value_pad + c) * weight;
      store(acc + c, s ? load<Vec>(acc + c) + part : part);
    }
  }
  finish_row(call, row, acc, best, total);
}

}  // namespace

// A softcap of 0 stands for none. Returns 0, or 1 when memory ran out.
extern "C" int mikv_attend(const void* arguments, float scale, float softcap) {
  const Call& call = *static_cast<const Call*>(arguments);
  const Plan plan(call);
  const int threads = static_cast<int>(std::min(call.threads, std::max<int64_t>(plan.items, 1)));
  const int64_t scratch_floats = Scratch::floats(plan);
  const int64_t all_rows = call.batch * call.kv_heads * plan.packed_rows;
  const int64_t partial_rows = plan.splits > 1 ? all_rows * plan.splits : 0;

  const int64_t total = threads * scratch_floats + partial_rows * (plan.value_pad + 2);
  std::unique_ptr<float[]> memory(new (std::nothrow) float[total + 16]);
  if (!memory) return 1;
  // Vec is stored in scratch memory: begin at a multiple of its size.
  float* base = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t{63});
  float* rest = base + threads * scratch_floats;
  const Partials partials{rest, rest + partial_rows, rest + 2 * partial_rows};

#pragma omp parallel num_threads(threads)
  {
#if defined(_OPENMP)
    const int thread = omp_get_thread_num();
#else
    const int thread = 0;
#endif
    const Scratch mine(plan, base + thread * scratch_floats);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t item = 0; item < plan.items; ++item) run_item(call, plan, scale, softcap, item, mine, partials);
  }
  // At most 2 * kItems * kRowBlock partial rows, mostly far fewer: cheaper than one more barrier.
  if (plan.splits > 1)
    for (int64_t row = 0; row < all_rows; ++row) merge_row(call, plan, row, partials);
  return 0;
}
