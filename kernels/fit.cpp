// Rounding that looks at what is lost (fit.py): the C++ of fit_groups and fit_guided, for groups that are one channel of
// a block of tokens, or some channels of one token. Called by cpp_fit.py; the text of vector.h stands before this one.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

constexpr float kNarrowed[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.7f, 0.6f, 0.5f};
constexpr double kHalfMax = 65504.0;

// 8-byte fields, written by cpp_fit.py in this order. All arrays are contiguous.
struct Call {
  const float* x;         // [heads, tokens, dim]
  uint8_t* codes;         // [heads, tokens, dim]
  uint16_t *scales, *zeros;  // float16 [heads, tokens / block, dim / channels]
  const int64_t* order;   // [heads, dim] or null
  const float* factor;    // [heads, dim, dim] or null
  int64_t heads, tokens, dim, block, channels, bits, unbiased, threads;
};

inline float rounded_to_half(double x, uint16_t* to) {
  float value = static_cast<float>(x);
  floats_to_halves(&value, 1, to);
  halves_to_floats(to, 1, &value);
  return value;
}

// Fits n neighbouring numbers; `codes` and `scratch` have room for n. Gives scale and zero as rounded to half.
void fit(const float* x, int64_t n, int bits, bool unbiased, float* codes, float* scratch, uint16_t* half_scale,
         uint16_t* half_zero, float* scale, float* zero) {
  const float levels = static_cast<float>((1 << bits) - 1);
  float low = x[0], high = x[0];
  double sum = 0;
  bool number = true;
  for (int64_t i = 0; i < n; ++i) {
    low = std::min(low, x[i]);
    high = std::max(high, x[i]);
    sum += x[i];
    number &= x[i] == x[i];
  }
  const double mean = number ? sum / n : std::numeric_limits<double>::quiet_NaN();
  double variance = 0;
  for (int64_t i = 0; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean);
  variance /= n;
  const float middle = (low + high) / 2, half = (high - low) / 2;
  double best = -1, centre = 0, spread = 0, shared = 0;
  for (const float part : kNarrowed) {
    const float step = half * part * 2 / levels, offset = middle - half * part;
    if (!(step > 0) || !number) break;
    float total = 0, squares = 0;  // whole numbers: exact
    double product = 0;
#pragma omp simd reduction(+ : total, squares, product)
    for (int64_t i = 0; i < n; ++i) {
      float code = std::nearbyint((x[i] - offset) / step);
      code = code > 0.0f ? code : 0.0f;
      code = code < levels ? code : levels;
      scratch[i] = code;
      total += code;
      squares += code * code;
      product += static_cast<double>(x[i]) * code;
    }
    const double c = static_cast<double>(total) / n, s = static_cast<double>(squares) / n - c * c;
    const double p = product / n - mean * c, explained = s > 0 ? p * p / s : 0.0;
    if (explained > best) {
      best = explained, centre = c, spread = s, shared = p;
      std::memcpy(codes, scratch, n * sizeof(float));
    }
  }
  double slope = 0;
  if (spread > 0 && shared > 0) slope = unbiased ? variance / shared : shared / spread;
  *scale = rounded_to_half(std::min(slope, kHalfMax), half_scale);
  const double where = mean - static_cast<double>(*scale) * centre;
  *zero = rounded_to_half(where != where ? where : std::max(std::min(where, kHalfMax), -kHalfMax), half_zero);
  if (!(*scale > 0)) std::fill_n(codes, n, 0.0f);
}

// One block of tokens of one head, channel by channel.
void fit_block(const Call& call, int64_t head, int64_t block, float* memory) {
  const int64_t dim = call.dim, n = call.block;
  float *rest = memory, *codes = rest + dim * n, *scratch = codes + n, *missing = scratch + n;
  const float* x = call.x + (head * call.tokens + block * n) * dim;
  uint8_t* out = call.codes + (head * call.tokens + block * n) * dim;
  const int64_t params = (head * (call.tokens / n) + block) * dim;
  const int64_t* order = call.order ? call.order + head * dim : nullptr;
  const float* factor = call.factor ? call.factor + head * dim * dim : nullptr;
  for (int64_t c = 0; c < dim; ++c) {
    const int64_t channel = order ? order[c] : c;
    for (int64_t t = 0; t < n; ++t) rest[c * n + t] = x[t * dim + channel];
  }
  for (int64_t c = 0; c < dim; ++c) {
    const int64_t channel = order ? order[c] : c;
    float* mine = rest + c * n;
    float scale, zero;
    fit(mine, n, static_cast<int>(call.bits), call.unbiased, codes, scratch, call.scales + params + channel,
        call.zeros + params + channel, &scale, &zero);
    for (int64_t t = 0; t < n; ++t) out[t * dim + channel] = static_cast<uint8_t>(codes[t]);
    if (!factor) continue;
    const float* row = factor + c * dim;
    for (int64_t t = 0; t < n; ++t) missing[t] = (mine[t] - (codes[t] * scale + zero)) / row[c];
    for (int64_t j = c + 1; j < dim; ++j) {
      float* other = rest + j * n;
      const float share = row[j];
#pragma omp simd
      for (int64_t t = 0; t < n; ++t) other[t] -= share * missing[t];
    }
  }
}

// Tokens of one head that have scales of their own.
void fit_tokens(const Call& call, int64_t head, int64_t begin, int64_t end, float* memory) {
  const int64_t groups = call.dim / call.channels, n = call.channels;
  float *codes = memory, *scratch = codes + n;
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = (head * call.tokens + t) * call.dim + g * n, param = (head * call.tokens + t) * groups + g;
      float scale, zero;
      fit(call.x + at, n, static_cast<int>(call.bits), call.unbiased, codes, scratch, call.scales + param,
          call.zeros + param, &scale, &zero);
      for (int64_t i = 0; i < n; ++i) call.codes[at + i] = static_cast<uint8_t>(codes[i]);
    }
  }
}

}  // namespace

// 0: done. 1: no memory. `call.block` or `call.channels` is 1.
extern "C" int mikv_fit(const void* fields) {
  const Call call = *static_cast<const Call*>(fields);
  const bool per_channel = call.channels == 1;
  const int64_t span = per_channel ? call.block : 64;  // tokens of a work item
  const int64_t spans = (call.tokens + span - 1) / span, items = call.heads * spans;
  const int64_t size = per_channel ? (call.dim + 3) * call.block : 2 * call.channels;
  const int64_t threads = std::max<int64_t>(std::min(call.threads, items), 1);
  std::unique_ptr<float[]> memory(new (std::nothrow) float[size * threads]);
  if (!memory) return 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t item = 0; item < items; ++item) {
#if defined(_OPENMP)
    float* mine = memory.get() + omp_get_thread_num() * size;
#else
    float* mine = memory.get();
#endif
    const int64_t head = item / spans, begin = item % spans * span;
    if (per_channel)
      fit_block(call, head, begin / span, mine);
    else
      fit_tokens(call, head, begin, std::min(begin + span, call.tokens), mine);
  }
  return 0;
}
