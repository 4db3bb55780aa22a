// Select, write, read, move and demote the tokens of a store, on the CPU. Called by cpp_tokens.py through ctypes; the text of
// vector.h stands before this one.
//
// What is stored equals the reference (tokens.py, quantize.py) bit by bit: the same float32 operations in the same
// order, so this is built without contraction to fused multiply-add. Tokens do not depend on each other beyond their
// block, so neither do results on the number of threads.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Arguments: arrays of 8-byte fields, written by cpp_tokens.py in this order.

// How numbers are stored. Coded sides have the width of a code as their kind.
enum Kind : int64_t { kFloat32 = 32, kFloat16 = 16, kBFloat16 = 17 };

enum Status : int { kDone = 0, kNoMemory = 1, kBadIndex = 2 };

// Keys or values of one tier. Strides count elements.
struct Side {
  int64_t kind;
  int64_t tokens;    // consecutive slots that share a scale
  int64_t channels;  // neighbouring channels that share a scale
  uint8_t* codes;
  int64_t batch_stride, head_stride, slot_stride;
  uint16_t* scales;  // float16; null when kind is a floating-point one
  uint16_t* zeros;   // float16, strides of `scales`
  int64_t param_batch_stride, param_head_stride, param_block_stride;
};

struct Tier {
  Side key, value;
  int32_t* positions;
  int64_t position_batch_stride, position_head_stride;
  int64_t balanced;  // keys are stored multiplied by the balancer
  int64_t start;     // demote: slots in use of a lower tier
  int64_t count;     // demote: tokens that it receives
};

// Dense keys or values [B, H, T, D].
struct Dense {
  int64_t kind;
  uint8_t* data;
  int64_t batch_stride, head_stride, token_stride;
};

template <class T>
struct Rows {  // [B, H, N], the last dimension contiguous
  T* data;
  int64_t batch_stride, head_stride;

  T* of(int64_t b, int64_t h) const { return data ? data + b * batch_stride + h * head_stride : nullptr; }
};

struct Call {
  // What changes from one call of a PackedStore to the next.
  Dense k, v;            // write: taken; read: written
  int64_t start;         // write: first slot
  int64_t count;         // tokens to write, slots to read, pairs to copy; demote: slots in use of tier 0
  int64_t first_position;
  Rows<const float> own_scores;  // write: scores of the tokens, null stands for zeros; demote: ranks, null: the scores
  int64_t victims, sinks, recent_from;  // demote
  int64_t threads;
  // What does not.
  int64_t batch, heads, key_dim, value_dim;
  const float* balancer;  // [B, H, D_k] or null
  Rows<float> scores;     // of tier 0, or null
  Rows<const int64_t> index;   // write: tokens to take, null takes all; read: slots; copy: sources
  Rows<const int64_t> target;  // copy
  Rows<const int32_t> places;  // write: position of each token, null: first_position + t
  int64_t limit;               // index and target are below
  int64_t num_tiers;
  Tier tiers[1];  // num_tiers of them; only demote has more than one
};
static_assert(sizeof(void*) == 8, "arguments are passed as 8-byte fields");
static_assert(sizeof(Tier) == 30 * 8 && sizeof(Call) == (39 + 30) * 8, "layout is mirrored in cpp_tokens.py");

constexpr int64_t kChunk = 128;      // tokens of a work item
constexpr int64_t kMinWork = 131072;  // numbers (about 0.1 ms) below which one more thread does not pay
constexpr float kHalfMax = 65504.0f;
constexpr float kInf = std::numeric_limits<float>::infinity();

inline bool is_float(int64_t kind) { return kind >= 16; }
inline int64_t bytes_of(int64_t kind) { return kind == kFloat32 ? 4 : is_float(kind) ? 2 : 1; }

// ---------------------------------------------------------------------------------------------------------------------
// Memory of one thread, carved from one block; laid out without a block first, to learn the size.

struct Arena {
  uint8_t* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t n) {
    T* found = reinterpret_cast<T*>(base + used);
    used = round_up(used + n * static_cast<int64_t>(sizeof(T)), 64);
    return found;
  }
};

template <class Make>
class Scratch {
 public:
  Scratch(int64_t threads, const Make& make) : make_(make) {
    Arena measure{nullptr};
    make(measure);
    size_ = measure.used;
    // Zeros: lanes beyond the last channel are computed, too, and must be numbers.
    memory_.reset(new (std::nothrow) uint8_t[size_ * threads + 64]());
  }
  explicit operator bool() const { return memory_ != nullptr; }
  auto of(int64_t thread) const {
    const uintptr_t aligned = (reinterpret_cast<uintptr_t>(memory_.get()) + 63) & ~uintptr_t{63};
    Arena arena{reinterpret_cast<uint8_t*>(aligned) + thread * size_};
    return make_(arena);
  }

 private:
  Make make_;
  int64_t size_;
  std::unique_ptr<uint8_t[]> memory_;
};

template <class Make>
Scratch(int64_t, const Make&) -> Scratch<Make>;

inline int64_t threads_for(const Call& call, int64_t items, int64_t numbers) {
  return std::max<int64_t>(std::min({call.threads, items, numbers / kMinWork}), 1);
}

// A parallel region costs more than a single token, so one thread runs without.
template <class Scratches, class Run>
void for_each_item(int64_t items, int64_t threads, const Scratches& scratches, const Run& run) {
  if (threads == 1) {
    const auto mine = scratches.of(0);
    for (int64_t item = 0; item < items; ++item) run(item, mine);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
#if defined(_OPENMP)
    const auto mine = scratches.of(omp_get_thread_num());
#else
    const auto mine = scratches.of(0);
#endif
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t item = 0; item < items; ++item) run(item, mine);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows of floating-point numbers.

inline void to_floats(const uint8_t* from, int64_t kind, int64_t n, float* to) {
  if (kind == kFloat32)
    std::memcpy(to, from, n * 4);
  else if (kind == kFloat16)
    halves_to_floats(reinterpret_cast<const uint16_t*>(from), n, to);
  else
    bfloats_to_floats(reinterpret_cast<const uint16_t*>(from), n, to);
}

inline void from_floats(const float* from, int64_t kind, int64_t n, uint8_t* to) {
  if (kind == kFloat32)
    std::memcpy(to, from, n * 4);
  else if (kind == kFloat16)
    floats_to_halves(from, n, reinterpret_cast<uint16_t*>(to));
  else
    floats_to_bfloats(from, n, reinterpret_cast<uint16_t*>(to));
}

// Minimum and maximum that are NaN where one of both is.
struct Least {
  Vec operator()(Vec a, Vec b) const { return (b < a) | (b != b) ? b : a; }
  float operator()(float a, float b) const { return b < a || b != b ? b : a; }
};
struct Greatest {
  Vec operator()(Vec a, Vec b) const { return (b > a) | (b != b) ? b : a; }
  float operator()(float a, float b) const { return b > a || b != b ? b : a; }
};

template <class Op>
inline float join(const float* x, int64_t n, const Op& op) {
  int64_t i = 1;
  float found = x[0];
  if (n >= kLanes) {
    Vec all = load<Vec>(x);
    for (i = kLanes; i + kLanes <= n; i += kLanes) all = op(all, load<Vec>(x + i));
    found = join_lanes(all, op);
  }
  for (; i < n; ++i) found = op(found, x[i]);
  return found;
}

// Each group's number for each of its channels. Whole vectors: `to` has room behind the last group.
inline void expand(const float* from, int64_t groups, int64_t channels, float* to) {
  for (int64_t g = 0; g < groups; ++g, to += channels) {
    const Vec x = splat(from[g]);
    for (int64_t c = 0; c < channels; c += kLanes) store(to + c, x);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Codes to bytes and back (packing.py): byte j of a row has the codes of channels j, j + width, j + 2 * width, ...
// Many bytes are shifted at a time as one wide integer; masks remove what comes from the neighbour.

typedef uint64_t Words __attribute__((vector_size(16)));

template <class T>
inline T repeated(int byte) {
  const uint64_t word = 0x0101010101010101u * static_cast<uint64_t>(byte);
  if constexpr (std::is_same_v<T, Words>)
    return Words{word, word};
  else
    return static_cast<T>(word);
}

// step(j, T{}) for j = 0, sizeof(T), ... with the widest types T that fit.
template <class Step>
inline void for_bytes(int64_t n, const Step& step) {
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) step(j, Words{});
  for (; j + 8 <= n; j += 8) step(j, uint64_t{});
  for (; j < n; ++j) step(j, uint8_t{});
}

// Planes of the bits kShift .. kShift + kBits of the codes.
template <int kBits, int kShift = 0>
inline void pack_planes(const uint8_t* codes, int64_t dim, uint8_t* to) {
  const int64_t width = dim * kBits / 8;
  for_bytes(width, [&](int64_t j, auto packed) {
    using T = decltype(packed);
    const T mask = repeated<T>((1 << kBits) - 1);
#pragma GCC unroll 8
    for (int p = 0; p < 8 / kBits; ++p)
      packed |= static_cast<T>(((load<T>(codes + p * width + j) >> kShift) & mask) << (p * kBits));
    store(to + j, packed);
  });
}

template <int kBits, int kShift = 0>
inline void unpack_planes(const uint8_t* from, int64_t dim, uint8_t* codes) {
  const int64_t width = dim * kBits / 8;
  for_bytes(width, [&](int64_t j, auto packed) {
    using T = decltype(packed);
    const T mask = repeated<T>((1 << kBits) - 1);
    packed = load<T>(from + j);
#pragma GCC unroll 8
    for (int p = 0; p < 8 / kBits; ++p) {
      uint8_t* to = codes + p * width + j;
      const T part = static_cast<T>(((packed >> (p * kBits)) & mask) << kShift);
      store(to, kShift ? static_cast<T>(load<T>(to) | part) : part);
    }
  });
}

inline void pack(const uint8_t* codes, int64_t bits, int64_t dim, uint8_t* to) {
  if (bits == 8) std::memcpy(to, codes, dim);
  if (bits == 4) pack_planes<4>(codes, dim, to);
  if (bits == 2) pack_planes<2>(codes, dim, to);
  if (bits == 3) {
    pack_planes<2>(codes, dim, to);
    pack_planes<1, 2>(codes, dim, to + dim / 4);
  }
}

inline void unpack(const uint8_t* from, int64_t bits, int64_t dim, uint8_t* codes) {
  if (bits == 8) std::memcpy(codes, from, dim);
  if (bits == 4) unpack_planes<4>(from, dim, codes);
  if (bits == 2) unpack_planes<2>(from, dim, codes);
  if (bits == 3) {
    unpack_planes<2>(from, dim, codes);
    unpack_planes<1, 2>(from + dim / 4, dim, codes);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// One side of one (batch row, KV head).

struct HeadSide {
  int64_t kind, tokens, channels, dim;
  uint8_t* codes;
  int64_t slot_bytes;
  uint16_t *scales, *zeros;
  int64_t block_stride;
  const float* balancer;  // or null

  HeadSide(const Side& side, int64_t dim, const float* balancer, int64_t b, int64_t h)
      : kind(side.kind), tokens(side.tokens), channels(side.channels), dim(dim), balancer(balancer) {
    const int64_t bytes = bytes_of(kind);
    codes = side.codes + (b * side.batch_stride + h * side.head_stride) * bytes;
    slot_bytes = side.slot_stride * bytes;
    block_stride = side.param_block_stride;
    const int64_t params = b * side.param_batch_stride + h * side.param_head_stride;
    scales = is_float(kind) ? nullptr : side.scales + params;
    zeros = is_float(kind) ? nullptr : side.zeros + params;
  }
};

struct Head {
  HeadSide key, value;
  int32_t* positions;

  Head(const Call& call, const Tier& tier, int64_t b, int64_t h)
      : key(tier.key, call.key_dim,
            tier.balanced ? call.balancer + (b * call.heads + h) * call.key_dim : nullptr, b, h),
        value(tier.value, call.value_dim, nullptr, b, h),
        positions(tier.positions + b * tier.position_batch_stride + h * tier.position_head_stride) {}
};

// Numbers per channel have room for `pad` of them and for one more vector, which `expand` may begin.
struct Workspace {
  int64_t pad;
  float* rows;  // [tokens of a block, pad]
  float *low, *high;          // per channel, then per group
  float *step, *offset;       // per group
  float *wide_step, *wide_offset;  // per channel
  uint8_t* codes;
};

inline Workspace carve(Arena& arena, const Call& call, int64_t block) {
  Workspace w;
  w.pad = round_up(std::max(call.key_dim, call.value_dim), kLanes);
  w.rows = arena.take<float>(w.pad * block);
  for (float** part : {&w.low, &w.high, &w.step, &w.offset, &w.wide_step, &w.wide_offset})
    *part = arena.take<float>(w.pad + kLanes);
  w.codes = arena.take<uint8_t>(w.pad);
  return w;
}

// ---------------------------------------------------------------------------------------------------------------------
// Writing.

struct Source {
  const uint8_t* data;
  int64_t kind;
  int64_t token_bytes;
  const int64_t* index;  // or null

  const uint8_t* row(int64_t i) const { return data + (index ? index[i] : i) * token_bytes; }
};

// Quantize the block in w.rows into the slots from `slot` on (quantize.py).
inline void write_block(const HeadSide& side, int64_t slot, const Workspace& w) {
  const int64_t dim = side.dim, groups = dim / side.channels, tokens = side.tokens;
  const float *low = w.rows, *high = w.rows;
  if (tokens > 1) {
    for (int64_t c = 0; c < dim; c += kLanes) {
      Vec least = load<Vec>(w.rows + c), greatest = least;
      for (int64_t i = 1; i < tokens; ++i) {
        const Vec x = load<Vec>(w.rows + i * w.pad + c);
        least = Least()(least, x);
        greatest = Greatest()(greatest, x);
      }
      store(w.low + c, least);
      store(w.high + c, greatest);
    }
    low = w.low, high = w.high;
  }
  if (side.channels > 1) {
    // Group g is stored before what later groups are made of.
    for (int64_t g = 0; g < groups; ++g) {
      w.low[g] = join(low + g * side.channels, side.channels, Least());
      w.high[g] = join(high + g * side.channels, side.channels, Greatest());
    }
    low = w.low, high = w.high;
  }

  const float levels = static_cast<float>((1 << side.kind) - 1);
  for (int64_t g = 0; g < groups; g += kLanes) {
    Vec zero = load<Vec>(low + g);
    Vec scale = (load<Vec>(high + g) - zero) / levels;
    scale = scale > kHalfMax ? splat(kHalfMax) : scale;
    zero = zero < -kHalfMax ? splat(-kHalfMax) : zero;
    zero = zero > kHalfMax ? splat(kHalfMax) : zero;
    store(w.step + g, scale);
    store(w.offset + g, zero);
  }
  const int64_t params = slot / tokens * side.block_stride;
  floats_to_halves(w.step, groups, side.scales + params);
  floats_to_halves(w.offset, groups, side.zeros + params);
  // Codes are fitted to the rounded parameters.
  halves_to_floats(side.scales + params, groups, w.step);
  halves_to_floats(side.zeros + params, groups, w.offset);
  for (int64_t g = 0; g < groups; g += kLanes) {
    // A group that is constant, or has a NaN, gets the codes 0: numbers over infinity are 0, and NaN becomes 0 below.
    const Vec step = load<Vec>(w.step + g);
    store(w.step + g, step > 0.0f ? step : splat(kInf));
  }
  const float *step = w.step, *offset = w.offset;
  if (side.channels > 1) {
    expand(w.step, groups, side.channels, w.wide_step);
    expand(w.offset, groups, side.channels, w.wide_offset);
    step = w.wide_step, offset = w.wide_offset;
  }

  const Vec rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  for (int64_t i = 0; i < tokens; ++i) {
    const float* row = w.rows + i * w.pad;
    for (int64_t c = 0; c < dim; c += kLanes) {
      Vec code = (load<Vec>(row + c) - load<Vec>(offset + c)) / load<Vec>(step + c);
      code = code > 0.0f ? code : Vec{};
      code = code < levels ? code : splat(levels);
      code = code + rounder;
      narrow_to_bytes(w.codes + c, load<VecI>(&code) & 255);
    }
    pack(w.codes, side.kind, dim, side.codes + (slot + i) * side.slot_bytes);
  }
}

inline void write_side(const HeadSide& side, int64_t slot, int64_t n, const Source& source, const Workspace& w) {
  const int64_t dim = side.dim;
  if (is_float(side.kind)) {
    for (int64_t i = 0; i < n; ++i) {
      uint8_t* to = side.codes + (slot + i) * side.slot_bytes;
      if (source.kind == side.kind) {
        std::memcpy(to, source.row(i), dim * bytes_of(side.kind));
      } else {
        to_floats(source.row(i), source.kind, dim, w.rows);
        from_floats(w.rows, side.kind, dim, to);
      }
    }
    return;
  }
  for (int64_t begin = 0; begin < n; begin += side.tokens) {
    for (int64_t i = 0; i < side.tokens; ++i) {
      float* row = w.rows + i * w.pad;
      to_floats(source.row(begin + i), source.kind, dim, row);
      if (!side.balancer) continue;
      int64_t c = 0;
      for (; c + kLanes <= dim; c += kLanes) store(row + c, load<Vec>(row + c) * load<Vec>(side.balancer + c));
      for (; c < dim; ++c) row[c] *= side.balancer[c];
    }
    write_block(side, slot + begin, w);
  }
}

inline bool all_below(const int64_t* index, int64_t n, int64_t limit) {
  bool good = true;
  for (int64_t i = 0; i < n; ++i) good &= index[i] >= 0 && index[i] < limit;
  return good;
}

inline int64_t least_common_multiple(int64_t a, int64_t b) {
  int64_t found = a;
  while (found % b) found += a;
  return found;
}

int write_tokens(const Call& call) {
  const Tier& tier = call.tiers[0];
  const int64_t block = std::max(tier.key.tokens, tier.value.tokens);
  const int64_t chunk = round_up(kChunk, least_common_multiple(tier.key.tokens, tier.value.tokens));
  const int64_t chunks = (call.count + chunk - 1) / chunk, items = call.batch * call.heads * chunks;
  const int64_t numbers = call.batch * call.heads * call.count * (call.key_dim + call.value_dim);
  const int64_t threads = threads_for(call, items, numbers);
  const Scratch scratch(threads, [&](Arena& arena) { return carve(arena, call, block); });
  if (!scratch) return kNoMemory;
  std::atomic<int> status{kDone};
  for_each_item(items, threads, scratch, [&](int64_t item, const Workspace& w) {
    const int64_t row = item / chunks, b = row / call.heads, h = row % call.heads;
    const int64_t begin = item % chunks * chunk, n = std::min(chunk, call.count - begin), slot = call.start + begin;
    const int64_t* index = call.index.of(b, h);
    if (index && !all_below(index + begin, n, call.limit)) {
      status = kBadIndex;
      return;
    }
    const Head head(call, tier, b, h);
    auto source = [&](const Dense& x) {
      const int64_t bytes = bytes_of(x.kind), first = index ? 0 : begin * x.token_stride;
      const uint8_t* data = x.data + (b * x.batch_stride + h * x.head_stride + first) * bytes;
      return Source{data, x.kind, x.token_stride * bytes, index ? index + begin : nullptr};
    };
    write_side(head.key, slot, n, source(call.k), w);
    write_side(head.value, slot, n, source(call.v), w);
    const int32_t* places = call.places.of(b, h);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t token = index ? index[begin + i] : begin + i;
      head.positions[slot + i] = places ? places[token] : static_cast<int32_t>(call.first_position + token);
    }
    if (float* scores = call.scores.of(b, h)) {
      const float* own = call.own_scores.of(b, h);
      for (int64_t i = 0; i < n; ++i) scores[slot + i] = own ? own[begin + i] : 0.0f;
    }
  });
  return status;
}

// ---------------------------------------------------------------------------------------------------------------------
// Reading.

// Reads slots of one side; neighbours in one block share the expanded parameters.
class Reader {
 public:
  Reader(const HeadSide& side, const Workspace& w) : side_(side), w_(w) {}

  void read(int64_t slot, float* to) {
    const int64_t dim = side_.dim;
    const uint8_t* codes = side_.codes + slot * side_.slot_bytes;
    if (is_float(side_.kind)) {
      to_floats(codes, side_.kind, dim, to);
    } else {
      load_params(slot / side_.tokens);
      unpack(codes, side_.kind, dim, w_.codes);
      int64_t c = 0;
      for (; c + kLanes <= dim; c += kLanes) {
        const Vec code = __builtin_convertvector(widen_bytes(w_.codes + c), Vec);
        store(to + c, code * load<Vec>(step_ + c) + load<Vec>(offset_ + c));
      }
      for (; c < dim; ++c) to[c] = static_cast<float>(w_.codes[c]) * step_[c] + offset_[c];
    }
    if (side_.balancer) {
      int64_t c = 0;
      for (; c + kLanes <= dim; c += kLanes) store(to + c, load<Vec>(to + c) / load<Vec>(side_.balancer + c));
      for (; c < dim; ++c) to[c] /= side_.balancer[c];
    }
  }

 private:
  void load_params(int64_t block) {
    if (block == block_) return;
    block_ = block;
    const int64_t groups = side_.dim / side_.channels, params = block * side_.block_stride;
    halves_to_floats(side_.scales + params, groups, w_.step);
    halves_to_floats(side_.zeros + params, groups, w_.offset);
    step_ = w_.step, offset_ = w_.offset;
    if (side_.channels > 1) {
      expand(w_.step, groups, side_.channels, w_.wide_step);
      expand(w_.offset, groups, side_.channels, w_.wide_offset);
      step_ = w_.wide_step, offset_ = w_.wide_offset;
    }
  }

  const HeadSide& side_;
  const Workspace& w_;
  int64_t block_ = -1;
  const float *step_ = nullptr, *offset_ = nullptr;
};

int read_tokens(const Call& call) {
  const Tier& tier = call.tiers[0];
  const int64_t chunks = (call.count + kChunk - 1) / kChunk, items = call.batch * call.heads * chunks;
  const int64_t numbers = call.batch * call.heads * call.count * (call.key_dim + call.value_dim);
  const int64_t threads = threads_for(call, items, numbers);
  const Scratch scratch(threads, [&](Arena& arena) { return carve(arena, call, 0); });
  if (!scratch) return kNoMemory;
  std::atomic<int> status{kDone};
  for_each_item(items, threads, scratch, [&](int64_t item, const Workspace& w) {
    const int64_t row = item / chunks, b = row / call.heads, h = row % call.heads;
    const int64_t begin = item % chunks * kChunk, n = std::min(kChunk, call.count - begin);
    const int64_t* index = call.index.of(b, h) + begin;
    if (!all_below(index, n, call.limit)) {
      status = kBadIndex;
      return;
    }
    const Head head(call, tier, b, h);
    for (auto [side, x] : {std::pair{&head.key, &call.k}, std::pair{&head.value, &call.v}}) {
      Reader reader(*side, w);
      float* to = reinterpret_cast<float*>(x->data) + b * x->batch_stride + h * x->head_stride;
      for (int64_t i = 0; i < n; ++i) reader.read(index[i], to + (begin + i) * x->token_stride);
    }
  });
  return status;
}

// ---------------------------------------------------------------------------------------------------------------------
// Moving.

// Copies one slot onto another: codes, parameters, position, score. Scales are per token.
class Mover {
 public:
  Mover(const Head& head, float* scores) : head_(head), scores_(scores) {}

  void copy(int64_t source, int64_t target) const {
    if (source == target) return;
    copy_side(head_.key, source, target);
    copy_side(head_.value, source, target);
    head_.positions[target] = head_.positions[source];
    if (scores_) scores_[target] = scores_[source];
  }

 private:
  static void copy_side(const HeadSide& side, int64_t source, int64_t target) {
    const int64_t bytes = is_float(side.kind) ? side.dim * bytes_of(side.kind) : side.dim * side.kind / 8;
    std::memcpy(side.codes + target * side.slot_bytes, side.codes + source * side.slot_bytes, bytes);
    if (is_float(side.kind)) return;
    const int64_t groups = side.dim / side.channels;
    for (uint16_t* params : {side.scales, side.zeros})
      std::memcpy(params + target * side.block_stride, params + source * side.block_stride, groups * 2);
  }

  const Head& head_;
  float* scores_;
};

int copy_slots(const Call& call) {
  const int64_t items = call.batch * call.heads;
  const int64_t threads = threads_for(call, items, items * call.count * (call.key_dim + call.value_dim));
  const Scratch scratch(threads, [](Arena&) { return 0; });
  std::atomic<int> status{kDone};
  for_each_item(items, threads, scratch, [&](int64_t item, int) {
    const int64_t b = item / call.heads, h = item % call.heads;
    const int64_t *source = call.index.of(b, h), *target = call.target.of(b, h);
    if (!all_below(source, call.count, call.limit) || !all_below(target, call.count, call.limit)) {
      status = kBadIndex;
      return;
    }
    const Head head(call, call.tiers[0], b, h);
    const Mover mover(head, call.scores.of(b, h));
    for (int64_t i = 0; i < call.count; ++i) mover.copy(source[i], target[i]);
  });
  return status;
}

// ---------------------------------------------------------------------------------------------------------------------
// Selection and demotion (store_ops.py).

// A score as tokens are ranked by it: what is held back is above all others, and so is NaN.
inline float protected_score(float score, int64_t position, int64_t sinks, int64_t recent_from) {
  constexpr float kMax = std::numeric_limits<float>::max();
  if (position < sinks || position >= recent_from || score != score) return kInf;
  return std::min(std::max(score, -kMax), kMax);
}

struct Selection {
  Rows<const float> scores;  // [B, H, T]
  Rows<int64_t> chosen;      // [B, H, sum of counts]: tier after tier, ascending within each
  int64_t batch, heads, tokens, sinks, recent_from, threads;
  int64_t num_tiers;
  int64_t counts[1];  // num_tiers of them
};
static_assert(sizeof(Selection) == 14 * 8, "layout is mirrored in cpp_tokens.py");

// Numbers that are ordered as (score, token) are.
inline uint64_t rank_of(float score, int64_t token) {
  score += 0.0f;  // -0 becomes 0
  const uint32_t bits = load<uint32_t>(&score);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | static_cast<uint32_t>(token);
}

struct SelectionWorkspace {
  uint64_t* ranks;  // [tokens]
  uint8_t* tiers;   // [tokens]: 0 for none, or 1 + the tier
  int64_t** ends;   // [1 + tiers]: where each tier's next token goes
};

int select_tokens(const Selection& call) {
  const int64_t items = call.batch * call.heads, tokens = call.tokens;
  const int64_t threads = std::max<int64_t>(std::min({call.threads, items, items * tokens * 16 / kMinWork}), 1);
  const Scratch scratch(threads, [&](Arena& arena) {
    SelectionWorkspace w;
    w.ranks = arena.take<uint64_t>(tokens);
    w.tiers = arena.take<uint8_t>(tokens);
    w.ends = arena.take<int64_t*>(1 + call.num_tiers);
    return w;
  });
  if (!scratch) return kNoMemory;
  for_each_item(items, threads, scratch, [&](int64_t item, const SelectionWorkspace& w) {
    const int64_t b = item / call.heads, h = item % call.heads;
    const float* scores = call.scores.of(b, h);
    for (int64_t t = 0; t < tokens; ++t) {
      w.ranks[t] = rank_of(protected_score(scores[t], t, call.sinks, call.recent_from), t);
      w.tiers[t] = 0;
    }
    int64_t* to = call.chosen.of(b, h);
    uint64_t* stop = w.ranks + tokens;
    for (int64_t i = 0; i < call.num_tiers; ++i) {
      uint64_t* begin = stop - call.counts[i];
      if (begin != w.ranks && begin != stop) std::nth_element(w.ranks, begin, stop);
      for (; stop != begin; --stop) w.tiers[static_cast<uint32_t>(stop[-1])] = static_cast<uint8_t>(i + 1);
      w.ends[i + 1] = to;
      to += call.counts[i];
    }
    for (int64_t t = 0; t < tokens; ++t)
      if (w.tiers[t]) *w.ends[w.tiers[t]]++ = t;
  });
  return kDone;
}

struct Candidate {
  float score;
  int32_t position;
  int64_t slot;
};

// The least important first; older first among equals.
inline bool by_score(const Candidate& a, const Candidate& b) {
  return a.score != b.score ? a.score < b.score : a.position < b.position;
}

inline bool by_position(const Candidate& a, const Candidate& b) { return a.position < b.position; }

struct DemoteWorkspace {
  Workspace read, write;
  float *keys, *values;  // [tokens moved at a time, D]
  Candidate* candidates;  // [slots in use]
  uint8_t* leaves;        // [slots in use]
};

// Tokens moved at a time: whole blocks of the lower tier.
inline int64_t moved_at_once(const Tier& tier) {
  return round_up(16, least_common_multiple(tier.key.tokens, tier.value.tokens));
}

inline void move_down(const Call& call, const Head& head, const Head& lower, const Tier& tier,
                      const Candidate* tokens, const DemoteWorkspace& w) {
  const int64_t step = moved_at_once(tier);
  for (int64_t begin = 0; begin < tier.count; begin += step) {
    const int64_t n = std::min(step, tier.count - begin), slot = tier.start + begin;
    auto move = [&](const HeadSide& from, const HeadSide& to, float* rows) {
      Reader reader(from, w.read);
      for (int64_t i = 0; i < n; ++i) reader.read(tokens[begin + i].slot, rows + i * from.dim);
      write_side(to, slot, n, {reinterpret_cast<uint8_t*>(rows), kFloat32, from.dim * 4, nullptr}, w.write);
    };
    move(head.key, lower.key, w.keys);
    move(head.value, lower.value, w.values);
    for (int64_t i = 0; i < n; ++i) lower.positions[slot + i] = tokens[begin + i].position;
  }
}

int demote(const Call& call) {
  const Tier& tier = call.tiers[0];
  const int64_t items = call.batch * call.heads, used = call.count, victims = call.victims;
  int64_t block = 1, moved = 1;
  for (int64_t i = 1; i < call.num_tiers; ++i) {
    block = std::max({block, call.tiers[i].key.tokens, call.tiers[i].value.tokens});
    moved = std::max(moved, moved_at_once(call.tiers[i]));
  }
  const int64_t numbers = items * (victims * (call.key_dim + call.value_dim) + used * 16);
  const int64_t threads = threads_for(call, items, numbers);
  const Scratch scratch(threads, [&](Arena& arena) {
    DemoteWorkspace w;
    w.read = carve(arena, call, 0);
    w.write = carve(arena, call, block);
    w.keys = arena.take<float>(moved * call.key_dim);
    w.values = arena.take<float>(moved * call.value_dim);
    w.candidates = arena.take<Candidate>(used);
    w.leaves = arena.take<uint8_t>(used);
    return w;
  });
  if (!scratch) return kNoMemory;
  for_each_item(items, threads, scratch, [&](int64_t item, const DemoteWorkspace& w) {
    const int64_t b = item / call.heads, h = item % call.heads;
    const Head head(call, tier, b, h);
    float* scores = call.scores.of(b, h);
    const float* ranks = call.own_scores.of(b, h);
    for (int64_t i = 0; i < used; ++i) {
      const int32_t position = head.positions[i];
      const float score = protected_score(ranks ? ranks[i] : scores[i], position, call.sinks, call.recent_from);
      w.candidates[i] = {score, position, i};
      w.leaves[i] = 0;
    }
    std::partial_sort(w.candidates, w.candidates + victims, w.candidates + used, by_score);
    for (int64_t i = 0; i < victims; ++i) w.leaves[w.candidates[i].slot] = 1;

    // The best victims go to tier 1, the next to tier 2, and so on; what is left over is evicted.
    Candidate* stop = w.candidates + victims;
    for (int64_t i = 1; i < call.num_tiers; ++i) {
      const Tier& lower = call.tiers[i];
      stop -= lower.count;
      std::sort(stop, stop + lower.count, by_position);
      move_down(call, head, Head(call, lower, b, h), lower, stop, w);
    }

    // As many victims lie below `kept` as survivors above it.
    const Mover mover(head, scores);
    const int64_t kept = used - victims;
    for (int64_t hole = 0, from = kept; hole < kept; ++hole) {
      if (!w.leaves[hole]) continue;
      while (w.leaves[from]) ++from;
      mover.copy(from++, hole);
    }
  });
  return kDone;
}

}  // namespace

extern "C" int mikv_select_tokens(const void* call) { return select_tokens(*static_cast<const Selection*>(call)); }
extern "C" int mikv_demote(const void* call) { return demote(*static_cast<const Call*>(call)); }
extern "C" int mikv_write_tokens(const void* call) { return write_tokens(*static_cast<const Call*>(call)); }
extern "C" int mikv_read_tokens(const void* call) { return read_tokens(*static_cast<const Call*>(call)); }
extern "C" int mikv_copy_slots(const void* call) { return copy_slots(*static_cast<const Call*>(call)); }
