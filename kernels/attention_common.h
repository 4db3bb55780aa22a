// What the attention kernel gets from cpp_attention.py: arrays of 8-byte fields in this order; and the sizes of its tiles.

namespace {

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

constexpr int64_t kTile = 64;      // slots; a float32 tile of 128 channels takes 32 KiB
constexpr int64_t kSlotPad = 16;   // scores are computed for multiples of this many slots
constexpr int64_t kRowBlock = 32;  // query rows that share one dequantized tile
constexpr int64_t kItems = 64;     // work items to aim for: some balance between threads, few partial results
constexpr int64_t kMinSplit = 512; // slots below which a range of its own does not pay
constexpr int64_t kTilesPerThread = 24;  // tiles of work below which one more thread does not pay
constexpr int kMaxRows = kAccumulators >= 16 ? 4 : 2;  // query rows in registers at a time
static_assert(kSlotPad % kLanes == 0 && kTile % kSlotPad == 0, "softmax works on whole vectors of scores");

// A row of codes consists of planes of `width` channels: channel c = plane * width + j has its bits in byte j of the row
// (3 bits: the low two in byte (plane % 2) * width + j of the 2-bit part, the third in byte j of the 1-bit part).
constexpr int planes_of(int bits) { return bits == 3 ? 8 : 8 / bits; }

// Ask for the codes of n slots ahead of their use. A tile of codes is about a page long, and hardware prefetchers,
// which stop at page borders, would start anew in every tile.
void prefetch(const Side& side, int64_t b, int64_t h, int64_t begin, int64_t n, int64_t dim) {
  const int64_t size = side.kind == kFloat32 ? 4 : side.kind >= kFloat16 ? 2 : 1;
  const int64_t row_bytes = side.kind >= kFloat16 ? dim * size : dim * side.kind / 8;
  if (side.slot_stride * size != row_bytes) return;  // slots lie apart, as in own tokens of a [B, S, H, D] model
  const uint8_t* from = side.codes + (b * side.batch_stride + h * side.head_stride) * size + begin * row_bytes;
  for (int64_t i = 0; i < n * row_bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
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

}  // namespace
