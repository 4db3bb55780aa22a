// The two products of attention for many query rows: a tile is dequantized to float32 in L1 once for all of them.

namespace {

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

}  // namespace
