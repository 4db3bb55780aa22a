// The two products of attention for few query rows, on rows as they are stored.
//
// With few rows, dequantizing a tile to memory costs more than the products themselves. Here codes become floats in
// registers, and scales stay out of the inner loops. Keys whose scale serves a whole tile: the scale is multiplied into
// the query, and the zero becomes one number per query row. Keys with scales per token: one multiplication per vector,
// or, with a single scale per token, per score. Values with scales per token: the scale joins the weight, and zeros
// add up to one number per query row and group.
//
// Vectors come in "plane order", in which a stored row falls apart: a chunk of kLanes neighbouring bytes gives one
// vector for each plane of their bits. Query and accumulator are in plane order too; lanes beyond a plane hold zeros in
// the query, and garbage that nobody reads in the accumulator.

namespace {

constexpr int64_t kFewRows = 8;  // packed query rows up to which this pays

// Codes are read less their middle, so that sums of them cancel less: by a table lookup, which is free, or a subtraction.
constexpr int middle_of(int kind) { return 1 << (kind - 1); }

// The low kBits bits of each lane as a number, less the middle.
template <int kBits>
inline Vec code_values(VecI codes) {
#if defined(__AVX512F__)
  Vec table;
  for (int i = 0; i < kLanes; ++i) table[i] = static_cast<float>((i & ((1 << kBits) - 1)) - middle_of(kBits));
  // The permutation looks at the low four bits only.
  return reinterpret_cast<Vec>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(codes), reinterpret_cast<__m512>(table)));
#else
  return __builtin_convertvector((codes & ((1 << kBits) - 1)) - middle_of(kBits), Vec);
#endif
}

constexpr bool is_coded(int kind) { return kind <= 8; }

// A chunk of a stored row, and how it becomes the floats of a plane.
template <int kKind>
struct CodeChunk {
  static_assert(kKind == 8 || kKind == 4 || kKind == 2);
  static constexpr int kPlanes = planes_of(kKind), kBytes = kLanes;
  VecI bytes;

  // kTail: only n bytes exist.
  template <bool kTail>
  static CodeChunk read(const uint8_t* row, int64_t, int64_t chunk, int64_t n) {
    const uint8_t* from = row + chunk * kLanes;
    return {kTail ? widen_some_bytes(from, n) : widen_bytes(from)};
  }

  template <int kPlane>
  Vec plane() const {
    if constexpr (kKind == 8) return __builtin_convertvector(bytes - middle_of(8), Vec);
    return code_values<kKind>(bytes >> (kPlane * kKind));
  }
};

template <>
struct CodeChunk<3> {
  static constexpr int kPlanes = 8, kBytes = kLanes;
  VecI low[2], high;  // low bits of the even and of the odd planes

  template <bool kTail>
  static CodeChunk read(const uint8_t* row, int64_t width, int64_t chunk, int64_t n) {
    auto widen = [&](const uint8_t* from) {
      return kTail ? widen_some_bytes(from + chunk * kLanes, n) : widen_bytes(from + chunk * kLanes);
    };
    return {{widen(row), widen(row + width)}, widen(row + 2 * width)};
  }

  template <int kPlane>
  Vec plane() const {
    const VecI low_bits = low[kPlane & 1] >> (kPlane >> 1) * 2;
    const VecI high_bit = kPlane < 2 ? high << (2 - kPlane) : high >> (kPlane - 2);
    return code_values<3>((low_bits & 3) | (high_bit & ~3));
  }
};

// The same for floating point: one plane.
template <int kKind>
struct FloatChunk {
  static constexpr int kPlanes = 1, kBytes = kLanes * (kKind == kFloat32 ? 4 : 2);
  Vec values;

  template <bool kTail>
  static FloatChunk read(const uint8_t* row, int64_t, int64_t chunk, int64_t n) {
    if constexpr (kKind == kFloat32) {
      const float* from = reinterpret_cast<const float*>(row) + chunk * kLanes;
      return {kTail ? load_some(from, n) : load<Vec>(from)};
    } else {
      const uint16_t* from = reinterpret_cast<const uint16_t*>(row) + chunk * kLanes;
      uint16_t some[kLanes] = {};
      if constexpr (kTail) {
        std::memcpy(some, from, n * sizeof(uint16_t));
        from = some;
      }
      return {kKind == kFloat16 ? widen_float16(from) : widen_bfloat16(from)};
    }
  }

  template <int kPlane>
  Vec plane() const {
    return values;
  }
};

template <int kKind>
using ChunkOf = std::conditional_t<is_coded(kKind), CodeChunk<kKind>, FloatChunk<kKind>>;

// Calls run(integral_constant of the kind).
template <class F>
void with_kind(int64_t kind, F run) {
  switch (kind) {
    case 8: return run(std::integral_constant<int, 8>{});
    case 4: return run(std::integral_constant<int, 4>{});
    case 3: return run(std::integral_constant<int, 3>{});
    case 2: return run(std::integral_constant<int, 2>{});
    case kFloat16: return run(std::integral_constant<int, kFloat16>{});
    case kBFloat16: return run(std::integral_constant<int, kBFloat16>{});
    default: return run(std::integral_constant<int, kFloat32>{});
  }
}

// How the channels of a side fall into vectors.
struct Planes {
  int64_t dim, planes, width, chunks, vectors, groups, channels;

  Planes(const Side& side, int64_t dim_) : dim(dim_) {
    planes = is_coded(static_cast<int>(side.kind)) ? planes_of(static_cast<int>(side.kind)) : 1;
    width = dim / planes;
    chunks = (width + kLanes - 1) / kLanes;
    vectors = chunks * planes;
    channels = is_coded(static_cast<int>(side.kind)) ? side.channels : dim;
    groups = dim / channels;
  }

  // Vector `chunk * planes + plane` holds `lanes` channels from `channel` on.
  int64_t channel(int64_t vector) const { return vector % planes * width + vector / planes * kLanes; }
  int64_t lanes(int64_t vector) const { return std::min<int64_t>(kLanes, width - vector / planes * kLanes); }
  int64_t group(int64_t vector) const { return channel(vector) / channels; }

  // Whether no vector straddles two groups.
  bool whole_groups() const {
    for (int64_t v = 0; v < vectors; ++v)
      if ((channel(v) + lanes(v) - 1) / channels != group(v)) return false;
    return true;
  }

  static int64_t most_vectors(int64_t dim) { return dim / kLanes + 8; }
};

// Groups of a side that is read as it is.
constexpr int64_t most_groups(int64_t dim) { return dim / kLanes + 1; }

// Whether a side can be read as it is: its scales serve whole tiles (keys only), or single tokens.
bool is_direct(const Side& side, int64_t dim, bool is_key) {
  if (!is_coded(static_cast<int>(side.kind))) return true;
  if (is_key && side.tokens % kTile == 0) return true;
  const Planes planes(side, dim);
  // Narrow planes may hold whole groups of less than a vector; there is no room for that many.
  return side.tokens == 1 && planes.groups <= most_groups(dim) && planes.whole_groups();
}

// Natural order to plane order, zeros in lanes that do not exist.
void to_planes(const Planes& planes, const float* from, float* to) {
  for (int64_t v = 0; v < planes.vectors; ++v, to += kLanes)
    store(to, load_some(from + planes.channel(v), planes.lanes(v)));
}

// Scales of one block of a side, in plane order: `zero + middle * scale` in the place of the zero, because codes
// are read less their middle.
inline void block_params(const Planes& planes, const Side& side, int64_t at, int64_t vector, float middle, Vec& scale,
                         Vec& zero) {
  const uint16_t *scales = side.scales + at, *zeros = side.zeros + at;
  const int64_t channel = planes.channel(vector), lanes = planes.lanes(vector);
  if (side.channels == 1 && lanes == kLanes) {
    scale = widen_float16(scales + channel);
    zero = widen_float16(zeros + channel);
  } else {
    float some[2][kLanes] = {};
    for (int64_t i = 0; i < lanes; ++i) {
      some[0][i] = half_to_float(scales[(channel + i) / side.channels]);
      some[1][i] = half_to_float(zeros[(channel + i) / side.channels]);
    }
    scale = load<Vec>(some[0]);
    zero = load<Vec>(some[1]);
  }
  zero += scale * middle;
}

// Scales of n tokens, and their zeros as above, as [groups, kTile]; 0 beyond n.
void token_params(const Planes& planes, const Side& side, int64_t at, int64_t n, float middle, float* raw,
                  float* scales, float* zeros) {
  const int64_t groups = planes.groups, padded = round_up(n, kLanes);
  auto gather = [&](const uint16_t* from, float* to) {
    const bool packed = side.param_block_stride == groups;
    if (packed && groups == 1) {
      halves_to_floats(from, n, to);
    } else {
      if (packed) {
        halves_to_floats(from, n * groups, raw);
      } else {
        for (int64_t i = 0; i < n; ++i) halves_to_floats(from + i * side.param_block_stride, groups, raw + i * groups);
      }
      if (groups == 2) std::fill_n(raw + 2 * n, 2 * (padded - n), 0.0f);
      for (int64_t i = 0; groups == 2 && i < padded; i += kLanes) {
        const Vec a = load<Vec>(raw + 2 * i), b = load<Vec>(raw + 2 * i + kLanes);
        store(to + i, every_other<0>(a, b));
        store(to + kTile + i, every_other<1>(a, b));
      }
      for (int64_t g = 0; groups != 2 && g < groups; ++g)
        for (int64_t i = 0; i < n; ++i) to[g * kTile + i] = raw[i * groups + g];
    }
    for (int64_t g = 0; g < groups; ++g) std::fill_n(to + g * kTile + n, padded - n, 0.0f);
  };
  gather(side.scales + at, scales);
  gather(side.zeros + at, zeros);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = 0; i < padded; i += kLanes) {
      float* zero = zeros + g * kTile + i;
      store(zero, load<Vec>(zero) + load<Vec>(scales + g * kTile + i) * middle);
    }
}

// Ask for what will be read after the next kAhead bytes of rows, a cache line per call. A tile of codes is about a page
// long, so hardware prefetchers, which stop at page borders, would start anew in every tile; asking for whole tiles at
// once is dropped when too many misses are under way.
constexpr int64_t kAhead = 4096;

// Rows of a tile as they are stored.
struct Rows {
  const uint8_t* data;
  int64_t stride;  // bytes
  int64_t ahead;   // bytes to the row that is prefetched

  Rows(const Side& side, int64_t b, int64_t h, int64_t begin) {
    const int64_t size = side.kind == kFloat32 ? 4 : is_coded(static_cast<int>(side.kind)) ? 1 : 2;
    stride = side.slot_stride * size;
    ahead = std::max<int64_t>(kAhead / std::max<int64_t>(stride, 1), 1) * stride;
    data = side.codes + (b * side.batch_stride + h * side.head_stride) * size + begin * stride;
  }
};

template <class C>
inline void prefetch_chunk(const uint8_t* row, int64_t chunk, int64_t ahead) {
  constexpr int kPerLine = std::max(64 / C::kBytes, 1);
  if (chunk % kPerLine == 0) __builtin_prefetch(row + chunk * C::kBytes + ahead);
}

template <class F, int... I>
inline void unrolled(F run, std::integer_sequence<int, I...>) {
  (run(std::integral_constant<int, I>{}), ...);
}

// scores[r, slot] = query row r times the key of each slot, without scales and zeros, or (kScaled) with the scales of
// tokens `scales` [groups, kTile].
template <int kKind, int kRows, bool kScaled>
void score_codes(const Planes& planes, Rows keys, int64_t n, const float* q, int64_t q_stride, const float* scales,
                 float* scores) {
  using C = ChunkOf<kKind>;
  constexpr int kPlanes = C::kPlanes;
  constexpr int kSlots = std::min(8, kAccumulators / (kRows == 3 ? 4 : kRows));
  constexpr int kSums = (kRows * kSlots + kLanes - 1) / kLanes * kLanes;
  const int64_t full = planes.width / kLanes, tail = planes.width - full * kLanes;
  for (int64_t i = 0; i < n; i += kSlots) {
    const uint8_t* rows[kSlots];
#pragma GCC unroll 8
    for (int s = 0; s < kSlots; ++s) rows[s] = keys.data + std::min(i + s, n - 1) * keys.stride;
    Vec acc[kSums] = {};
    auto add_chunk = [&](auto is_tail, int64_t chunk) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int s = 0; s < kSlots; ++s) prefetch_chunk<C>(rows[s], chunk, keys.ahead);
      C found[kSlots] = {C::template read<is_tail>(rows[0], planes.width, chunk, tail)};
#pragma GCC unroll 8
      for (int s = 1; s < kSlots; ++s) found[s] = C::template read<is_tail>(rows[s], planes.width, chunk, tail);
      unrolled(
          [&](auto plane) __attribute__((always_inline)) {
            const int64_t vector = chunk * kPlanes + plane;
            Vec query[kRows];
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) query[r] = load<Vec>(q + r * q_stride + vector * kLanes);
            const float* scale = kScaled ? scales + planes.group(vector) * kTile + i : nullptr;
#pragma GCC unroll 8
            for (int s = 0; s < kSlots; ++s) {
              Vec key = found[s].template plane<plane>();
              if constexpr (kScaled) key *= splat(scale[s]);
#pragma GCC unroll 4
              for (int r = 0; r < kRows; ++r) acc[r * kSlots + s] += query[r] * key;
            }
          },
          std::make_integer_sequence<int, kPlanes>{});
    };
    for (int64_t chunk = 0; chunk < full; ++chunk) add_chunk(std::false_type{}, chunk);
    if (tail) add_chunk(std::true_type{}, full);
    float sums[kSums];
#pragma GCC unroll 4
    for (int first = 0; first < kSums; first += kLanes) store(sums + first, lane_sums(acc + first));
    for (int r = 0; r < kRows; ++r) std::memcpy(scores + r * kTile + i, sums + r * kSlots, kSlots * sizeof(float));
  }
}

// acc[r, vector] += sum over n slots of weights[group of the vector, r, slot] * the slot's value, for kSpan chunks from
// `chunk` on, of which a plane's vectors share their group, and for kCount planes from kFirst on.
template <int kKind, int kRows, int kSpan, bool kTail, int kFirst, int kCount>
inline void add_chunks(const Planes& planes, Rows values, int64_t n, int64_t chunk, const float* weights,
                       int64_t weight_rows, float* acc, int64_t acc_stride) {
  using C = ChunkOf<kKind>;
  constexpr int kPlanes = C::kPlanes;
  const int64_t tail = planes.width - chunk * kLanes;
  const float* weight[kCount];
#pragma GCC unroll 4
  for (int p = 0; p < kCount; ++p)
    weight[p] = weights + planes.group(chunk * kPlanes + kFirst + p) * weight_rows * kTile;
  float* to = acc + (chunk * kPlanes + kFirst) * kLanes;
  Vec sum[kRows][kSpan][kCount];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < kSpan; ++c)
#pragma GCC unroll 4
      for (int p = 0; p < kCount; ++p) sum[r][c][p] = load<Vec>(to + r * acc_stride + (c * kPlanes + p) * kLanes);
  for (int64_t slot = 0; slot < n; ++slot) {
    const uint8_t* row = values.data + slot * values.stride;
#pragma GCC unroll 8
    for (int c = 0; c < kSpan; ++c) prefetch_chunk<C>(row, chunk + c, values.ahead);
    C found[kSpan] = {C::template read<kTail>(row, planes.width, chunk, tail)};
#pragma GCC unroll 8
    for (int c = 1; c < kSpan; ++c) found[c] = C::template read<kTail>(row, planes.width, chunk + c, tail);
    unrolled(
        [&](auto p) __attribute__((always_inline)) {
          Vec share[kRows];
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) share[r] = splat(weight[p][r * kTile + slot]);
#pragma GCC unroll 8
          for (int c = 0; c < kSpan; ++c) {
            const Vec value = found[c].template plane<kFirst + p>();
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) sum[r][c][p] += share[r] * value;
          }
        },
        std::make_integer_sequence<int, kCount>{});
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < kSpan; ++c)
#pragma GCC unroll 4
      for (int p = 0; p < kCount; ++p) store(to + r * acc_stride + (c * kPlanes + p) * kLanes, sum[r][c][p]);
}

template <int kKind, int kRows>
void add_codes(const Planes& planes, Rows values, int64_t n, const float* weights, int64_t weight_rows, float* acc,
               int64_t acc_stride) {
  constexpr int kPlanes = ChunkOf<kKind>::kPlanes, kCount = std::min(kPlanes, 4);
  constexpr int kSpan = std::max(1, std::min(8, kAccumulators / ((kRows == 3 ? 4 : kRows) * kCount)));
  const int64_t full = planes.width / kLanes;
  auto add = [&](auto span, auto is_tail, int64_t chunk) {
    add_chunks<kKind, kRows, span, is_tail, 0, kCount>(planes, values, n, chunk, weights, weight_rows, acc, acc_stride);
    if constexpr (kPlanes > kCount)
      add_chunks<kKind, kRows, span, is_tail, kCount, kPlanes - kCount>(planes, values, n, chunk, weights, weight_rows,
                                                                        acc, acc_stride);
  };
  auto share_groups = [&](int64_t chunk) {
    for (int64_t v = chunk * kPlanes; v < (chunk + 1) * kPlanes; ++v)
      if (planes.group(v) != planes.group(v + (kSpan - 1) * kPlanes)) return false;
    return true;
  };
  int64_t chunk = 0;
  while (chunk < full) {
    if (chunk + kSpan <= full && share_groups(chunk)) {
      add(std::integral_constant<int, kSpan>{}, std::false_type{}, chunk);
      chunk += kSpan;
    } else {
      add(std::integral_constant<int, 1>{}, std::false_type{}, chunk++);
    }
  }
  if (planes.width > full * kLanes) add(std::integral_constant<int, 1>{}, std::true_type{}, chunk);
}

// What reading the tiles of one tier takes. All arrays are scratch memory; see Scratch.
struct CodedTier {
  float* q;         // [rows, key vectors], plane order
  float* folded;    // the same, times the scales of a block of keys
  float* q_sums;    // [rows, key groups]
  float* bias;      // [rows], what the zeros of a block of keys add
  float* acc;       // [rows, value vectors + value groups]: weighted codes, and lanewise weighted zeros per group
  float* scales;    // [groups, kTile]
  float* zeros;     // [groups, kTile]
  float* raw;       // [kTile, groups]
  float* weights;   // [groups, rows, kTile]
};

// Raw scores of a tile [rows, kTile], for n slots and garbage up to the next whole vector.
void score_tile(const Side& side, const Planes& planes, int64_t b, int64_t h, int64_t begin, int64_t n, int64_t rows,
                const CodedTier& mine, float* scores) {
  const Rows keys(side, b, h, begin);
  const int64_t q_stride = planes.vectors * kLanes, padded = round_up(n, kLanes);
  const int64_t params = b * side.param_batch_stride + h * side.param_head_stride;
  const bool coded = is_coded(static_cast<int>(side.kind)), by_block = coded && side.tokens > 1;
  const float middle = coded ? static_cast<float>(middle_of(static_cast<int>(side.kind))) : 0.0f;
  const float* q = mine.q;
  if (by_block) {
    const int64_t at = params + begin / side.tokens * side.param_block_stride;
    Vec sums[kFewRows] = {};
    for (int64_t v = 0; v < planes.vectors; ++v) {
      Vec scale, zero;
      block_params(planes, side, at, v, middle, scale, zero);
      for (int64_t r = 0; r < rows; ++r) {
        const Vec query = load<Vec>(mine.q + r * q_stride + v * kLanes);
        store(mine.folded + r * q_stride + v * kLanes, query * scale);
        sums[r] += query * zero;
      }
    }
    for (int64_t r = 0; r < rows; ++r) mine.bias[r] = lane_sum(sums[r]);
    q = mine.folded;
  } else if (coded) {
    token_params(planes, side, params + begin * side.param_block_stride, n, middle, mine.raw, mine.scales, mine.zeros);
  }

  const bool scaled = coded && !by_block && planes.groups > 1;
  with_kind(side.kind, [&](auto kind) {
    for_row_blocks(rows, [&](int64_t r, auto count) {
      auto run = scaled ? score_codes<kind, count, is_coded(kind)> : score_codes<kind, count, false>;
      run(planes, keys, n, q + r * q_stride, q_stride, mine.scales, scores + r * kTile);
    });
  });

  if (!coded) return;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < padded; i += kLanes) {
      Vec s = load<Vec>(scores + r * kTile + i);
      if (by_block) {
        s += mine.bias[r];
      } else {
        if (!scaled) s *= load<Vec>(mine.scales + i);
        for (int64_t g = 0; g < planes.groups; ++g)
          s += load<Vec>(mine.zeros + g * kTile + i) * mine.q_sums[r * planes.groups + g];
      }
      store(scores + r * kTile + i, s);
    }
  }
}

// Adds a tile's values, weighted by `weights` [rows, kTile] (zero up to the next whole vector), to `mine.acc`.
void add_tile(const Side& side, const Planes& planes, int64_t b, int64_t h, int64_t begin, int64_t n, int64_t rows,
              const float* weights, int64_t acc_stride, const CodedTier& mine) {
  const Rows values(side, b, h, begin);
  const bool coded = is_coded(static_cast<int>(side.kind));
  if (coded) {
    const int64_t at = b * side.param_batch_stride + h * side.param_head_stride + begin * side.param_block_stride;
    const float middle = coded ? static_cast<float>(middle_of(static_cast<int>(side.kind))) : 0.0f;
    token_params(planes, side, at, n, middle, mine.raw, mine.scales, mine.zeros);
    for (int64_t g = 0; g < planes.groups; ++g)
      for (int64_t r = 0; r < rows; ++r) {
        float* sums = mine.acc + r * acc_stride + (planes.vectors + g) * kLanes;
        Vec sum = load<Vec>(sums);
        for (int64_t i = 0; i < n; i += kLanes) {
          const Vec weight = load<Vec>(weights + r * kTile + i);
          store(mine.weights + (g * rows + r) * kTile + i, weight * load<Vec>(mine.scales + g * kTile + i));
          sum += weight * load<Vec>(mine.zeros + g * kTile + i);
        }
        store(sums, sum);
      }
    weights = mine.weights;
  }
  with_kind(side.kind, [&](auto kind) {
    for_row_blocks(rows, [&](int64_t r, auto count) {
      add_codes<kind, count>(planes, values, n, weights + r * kTile, rows, mine.acc + r * acc_stride, acc_stride);
    });
  });
}

// Adds a tier's accumulator to one in natural order.
void from_planes(const Planes& planes, const float* from, float* to) {
  for (int64_t v = 0; v < planes.vectors; ++v) {
    const float zero = lane_sum(load<Vec>(from + (planes.vectors + planes.group(v)) * kLanes));
    const int64_t channel = planes.channel(v), lanes = planes.lanes(v);
    for (int64_t i = 0; i < lanes; ++i) to[channel + i] += from[v * kLanes + i] + zero;
  }
}

}  // namespace
