// Attention over the tiers of a mixed-precision KV store, on the CPU. Called by cpp_attention.py through ctypes.
//
// One work item is (batch row, KV head, block of query rows, range of tiles of kTile slots). The query heads of a KV head
// are packed as rows (row = head_in_group * R + r), so that a tile is read once for all of them. For each tile, scores
// are computed, the online softmax updates the running maximum and sum, and values are accumulated. The two products
// have two forms: attention_codes.h for few query rows, attention_unpacked.h for many. Ranges are merged by
// log-sum-exp. How tiles are cut into ranges depends on shapes alone, so the result has the same bits for any number of
// threads.

#include <algorithm>
#include <memory>
#include <new>
#include <utility>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

// How a call is cut into work items; a function of shapes alone.
struct Plan {
  int64_t packed_rows;       // G * R
  int64_t row_blocks;        // per (batch row, KV head)
  int64_t tiles;             // of all tiers; none lies in two tiers
  int64_t splits;            // ranges of tiles
  int64_t split_tiles;
  int64_t key_pad, value_pad;  // channels in whole vectors
  int64_t items;

  explicit Plan(const Call& call) {
    packed_rows = call.group * call.rows;
    row_blocks = (packed_rows + kRowBlock - 1) / kRowBlock;
    key_pad = round_up(call.key_dim, kLanes);
    value_pad = round_up(call.value_dim, kLanes);
    tiles = 0;
    for (int64_t t = 0; t < call.num_tiers; ++t) tiles += tiles_of(call.tiers[t]);
    const int64_t blocks = std::max<int64_t>(call.batch * call.kv_heads * row_blocks, 1);
    const int64_t wanted = std::max<int64_t>(std::min((kItems + blocks - 1) / blocks, tiles * kTile / kMinSplit), 1);
    split_tiles = (tiles + wanted - 1) / wanted;
    splits = tiles ? (tiles + split_tiles - 1) / split_tiles : 1;
    items = call.batch * call.kv_heads * row_blocks * splits;
  }

  static int64_t tiles_of(const Tier& tier) { return (tier.count + kTile - 1) / kTile; }

  // Whether a tier's codes are read without dequantizing them to memory first.
  bool is_direct(const Call& call, const Tier& tier) const {
    return packed_rows <= kFewRows && ::is_direct(tier.key, call.key_dim, true) &&
           ::is_direct(tier.value, call.value_dim, false);
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
  CodedTier coded;

  static constexpr int64_t kRunFloats = sizeof(Run) / sizeof(float);

  static int64_t floats(const Plan& plan) {
    float* const start = nullptr;
    return round_up(Scratch(plan, start).end - start, 1024);  // threads do not share pages or cache lines
  }

  Scratch(const Plan& plan, float* at) {
    const int64_t dim = std::max(plan.key_pad, plan.value_pad), vectors = Planes::most_vectors(dim);
    auto take = [&at](int64_t n) { return std::exchange(at, at + round_up(n, kLanes)); };
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
    coded.q = take(kFewRows * vectors * kLanes);
    coded.folded = take(kFewRows * vectors * kLanes);
    coded.q_sums = take(kFewRows * dim);
    coded.bias = take(kFewRows);
    const int64_t groups = most_groups(dim);
    coded.acc = take(kFewRows * (vectors + groups) * kLanes);
    coded.scales = take(groups * kTile);
    coded.zeros = take(groups * kTile);
    coded.raw = take(groups * kTile);
    coded.weights = take(groups * kFewRows * kTile);
    end = at;
  }

 private:
  float* end;
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

// Not a plain sum: what a masked slot holds must not turn -inf into NaN.
inline Vec masked(Vec scores, Vec bias) { return bias == splat(kNegInf) ? bias : scores + bias; }

// An accumulator of one row, in whole vectors.
struct Accumulator {
  float* data;
  int64_t size;

  void operator*=(float factor) const {
    for (int64_t c = 0; c < size; c += kLanes) store(data + c, load<Vec>(data + c) * factor);
  }
};

// Turn one row's scores of n slots into weights; keep the running maximum, sum and accumulators in step.
void softmax_row(float* scores, const float* bias, int64_t n, float& row_max, Vec& row_sum, Accumulator acc,
                 Accumulator tier_acc) {
  const int64_t padded = round_up(n, kSlotPad);
  std::fill(scores + n, scores + padded, kNegInf);
  Vec best = splat(kNegInf);
  for (int64_t i = 0; i < padded; i += kLanes) {
    Vec s = load<Vec>(scores + i);
    if (bias) {
      s = masked(s, load<Vec>(bias + i));
      store(scores + i, s);
    }
    best = best > s ? best : s;
  }
  const float before = row_max, now = std::max(before, lane_max(best));
  if (now != before) {
    const float shrink = before == kNegInf ? 0.0f : std::exp(before - now);
    row_sum *= shrink;
    acc *= shrink;
    tier_acc *= shrink;
    row_max = now;
  }
  const Vec base = splat(now == kNegInf ? 0.0f : now);
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vec weight = exp_nonpositive(load<Vec>(scores + i) - base);
    row_sum += weight;
    store(scores + i, weight);
  }
}

// A work item's rows, and what it reads of a tier.
struct Work {
  int64_t b, h, first_row, rows;
};

// Apply the softcap to the scores of one tile, and call run(row, what to add to its scores or null) for each row.
template <class F>
void for_masked_rows(const Call& call, const Tier& tier, const Work& work, int64_t begin, int64_t n, float softcap,
                     const Scratch& mine, F run) {
  if (softcap != 0.0f)
    for (int64_t r = 0; r < work.rows; ++r) cap_row(mine.scores + r * kTile, n, softcap);
  const int32_t* positions = tier.positions;
  if (positions) positions += work.b * tier.position_batch_stride + work.h * tier.position_head_stride + begin;
  const uint8_t* gathered = nullptr;
  for (int64_t r = 0; r < work.rows; ++r) {
    if (call.mask_kind != kNoMask) {
      const uint8_t* row = mask_row(call, work.b, work.h, work.first_row + r);
      // The query heads of a group mostly share one mask, and in decoding their rows are neighbours.
      if (row != gathered) gather_mask(call, row, positions, tier.first_position + begin, n, mine.bias);
      gathered = row;
    }
    run(r, gathered ? mine.bias : nullptr);
  }
}

// Scores of one tile to weights. The accumulators of the rows, and those of this tier, follow the maximum.
void weigh_tile(const Call& call, const Plan& plan, const Tier& tier, const Work& work, int64_t begin, int64_t n,
                float softcap, const Scratch& mine, float* tier_acc, int64_t tier_acc_size) {
  for_masked_rows(call, tier, work, begin, n, softcap, mine, [&](int64_t r, const float* bias) {
    softmax_row(mine.scores + r * kTile, bias, n, mine.max[r], mine.sum[r],
                {mine.acc + r * plan.value_pad, plan.value_pad}, {tier_acc + r * tier_acc_size, tier_acc_size});
  });
}

// Raw scores of one tile, from keys that are dequantized first.
void score_unpacked(const Call& call, const Plan& plan, const Tier& tier, const Work& work, int64_t begin, int64_t n,
                    const Scratch& mine) {
  const float* q = tier.balanced ? mine.q_balanced : mine.q;
  const Matrix keys = read_tile(tier.key, work.b, work.h, begin, n, call.key_dim, kSlotPad, mine.unpacker, mine.tile);
  for_row_blocks(work.rows, [&](int64_t r, auto count) {
    score_rows<count>(q + r * plan.key_pad, plan.key_pad, keys, round_up(n, kSlotPad), mine.scores + r * kTile);
  });
}

// Slots [begin, end) of a tier, dequantized tile by tile.
void attend_unpacked(const Call& call, const Plan& plan, const Tier& tier, const Work& work, int64_t begin, int64_t end,
                     float softcap, const Scratch& mine) {
  for (; begin < end; begin += kTile) {
    const int64_t n = std::min(kTile, end - begin);
    prefetch(tier.value, work.b, work.h, begin, n, call.value_dim);
    score_unpacked(call, plan, tier, work, begin, n, mine);
    weigh_tile(call, plan, tier, work, begin, n, softcap, mine, nullptr, 0);
    prefetch(tier.key, work.b, work.h, begin + n, std::min(kTile, end - begin - n), call.key_dim);
    const Matrix values = read_tile(tier.value, work.b, work.h, begin, n, call.value_dim, 1, mine.unpacker, mine.tile);
    for_row_blocks(work.rows, [&](int64_t r, auto count) {
      add_values<count>(mine.scores + r * kTile, values, n, plan.value_pad, mine.acc + r * plan.value_pad);
    });
  }
}

// Queries in the order in which keys are read as they are.
void arrange_queries(const Plan& plan, const Tier& tier, const Planes& keys, const Work& work, const Scratch& mine) {
  for (int64_t r = 0; r < work.rows; ++r) {
    const float* q = (tier.balanced ? mine.q_balanced : mine.q) + r * plan.key_pad;
    to_planes(keys, q, mine.coded.q + r * keys.vectors * kLanes);
    if (tier.key.tokens == 1)
      for (int64_t g = 0; g < keys.groups; ++g)
        mine.coded.q_sums[r * keys.groups + g] = sum_of(q + g * keys.channels, keys.channels);
  }
}

// The same, reading codes as they are.
void attend_codes(const Call& call, const Plan& plan, const Tier& tier, const Work& work, int64_t begin, int64_t end,
                  float softcap, const Scratch& mine) {
  const Planes keys(tier.key, call.key_dim), values(tier.value, call.value_dim);
  const CodedTier& coded = mine.coded;
  arrange_queries(plan, tier, keys, work, mine);
  const int64_t acc_size = (values.vectors + values.groups) * kLanes;
  std::fill_n(coded.acc, work.rows * acc_size, 0.0f);
  for (; begin < end; begin += kTile) {
    const int64_t n = std::min(kTile, end - begin);
    score_tile(tier.key, keys, work.b, work.h, begin, n, work.rows, coded, mine.scores);
    weigh_tile(call, plan, tier, work, begin, n, softcap, mine, coded.acc, acc_size);
    add_tile(tier.value, values, work.b, work.h, begin, n, work.rows, mine.scores, acc_size, coded);
  }
  for (int64_t r = 0; r < work.rows; ++r)
    from_planes(values, coded.acc + r * acc_size, mine.acc + r * plan.value_pad);
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

// The queries of a work item, times scale, and again divided by the balancer where there is one.
void load_queries(const Call& call, const Plan& plan, float scale, const Work& work, const Scratch& mine) {
  const int64_t pair = work.b * call.kv_heads + work.h;
  for (int64_t r = 0; r < work.rows; ++r) {
    const float* from = call.q + (pair * plan.packed_rows + work.first_row + r) * call.key_dim;
    for (int64_t c = 0; c < plan.key_pad; c += kLanes) {
      const Vec q = load_some(from + c, call.key_dim - c) * scale;
      store(mine.q + r * plan.key_pad + c, q);
      if (call.balancer) {
        const Vec balancer = load_some(call.balancer + pair * call.key_dim + c, call.key_dim - c);
        store(mine.q_balanced + r * plan.key_pad + c, q == Vec{} ? q : q / balancer);  // beyond the last channel: 0 / 0
      }
    }
  }
}

void run_item(const Call& call, const Plan& plan, float scale, float softcap, int64_t item, const Scratch& mine,
              const Partials& partials) {
  const int64_t split = item % plan.splits, block = item / plan.splits;
  const int64_t first_row = block % plan.row_blocks * kRowBlock, pair = block / plan.row_blocks;
  const int64_t b = pair / call.kv_heads, h = pair % call.kv_heads;
  const int64_t rows = std::min(kRowBlock, plan.packed_rows - first_row);

  const Work work{b, h, first_row, rows};
  load_queries(call, plan, scale, work, mine);
  for (int64_t r = 0; r < rows; ++r) {
    mine.max[r] = kNegInf;
    mine.sum[r] = Vec{};
  }
  std::fill_n(mine.acc, rows * plan.value_pad, 0.0f);

  // The range counts the tiles of all tiers in a row.
  int64_t from = split * plan.split_tiles, left = std::min(plan.split_tiles, plan.tiles - from);
  for (int64_t t = 0; t < call.num_tiers && left > 0; ++t) {
    const Tier& tier = call.tiers[t];
    const int64_t tiles = Plan::tiles_of(tier), taken = std::min(tiles - from, left);
    if (taken > 0) {
      const auto attend = plan.is_direct(call, tier) ? attend_codes : attend_unpacked;
      attend(call, plan, tier, work, from * kTile, std::min((from + taken) * kTile, tier.count), softcap, mine);
      left -= taken;
    }
    from = std::max<int64_t>(from - tiles, 0);
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

// What the slots [begin, begin + n) of a tier receive from all query rows is added to `sums` [n].
void sum_tile(const Call& call, const Plan& plan, const Tier& tier, int64_t b, int64_t h, int64_t begin, int64_t n,
              float scale, float softcap, const Scratch& mine, float* sums) {
  const Planes keys(tier.key, call.key_dim);
  const bool direct = plan.is_direct(call, tier);
  Vec received[kTile / kLanes] = {};
  for (int64_t first_row = 0; first_row < plan.packed_rows; first_row += kRowBlock) {
    const Work work{b, h, first_row, std::min(kRowBlock, plan.packed_rows - first_row)};
    load_queries(call, plan, scale, work, mine);
    if (direct) {
      arrange_queries(plan, tier, keys, work, mine);
      score_tile(tier.key, keys, b, h, begin, n, work.rows, mine.coded, mine.scores);
    } else {
      score_unpacked(call, plan, tier, work, begin, n, mine);
    }
    const float* lse = call.lse + (b * call.kv_heads + h) * plan.packed_rows + first_row;
    for_masked_rows(call, tier, work, begin, n, softcap, mine, [&](int64_t r, const float* bias) {
      const Vec norm = splat(lse[r] == kNegInf ? 0.0f : lse[r]);
      for (int64_t i = 0; i < n; i += kLanes) {
        Vec s = load<Vec>(mine.scores + r * kTile + i);
        if (bias) s = masked(s, load<Vec>(bias + i));
        received[i / kLanes] += exp_nonpositive(s - norm);
      }
    });
  }
  float all[kTile];
  for (int64_t i = 0; i < kTile; i += kLanes) store(all + i, received[i / kLanes]);
  for (int64_t i = 0; i < n; ++i) sums[i] += all[i];
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

namespace {

// Scratch memory of one call, aligned for Vec. Blocks of moderate size stay with the calling thread: a fresh one costs a
// page fault for every 4 KiB.
class Memory {
 public:
  explicit Memory(int64_t floats) {
    struct Kept {
      std::unique_ptr<float[]> block;
      int64_t size = 0;
    };
    static thread_local Kept kept;
    const int64_t size = floats + 16;
    if (size > kept.size) {
      own_.reset(new (std::nothrow) float[size]);
      data_ = own_.get();
      if (data_ && size <= kMostKept) {
        kept = {std::move(own_), size};
      }
    } else {
      data_ = kept.block.get();
    }
  }

  // Null if memory ran out.
  float* data() const {
    return data_ ? reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(data_) + 63) & ~uintptr_t{63}) : nullptr;
  }

 private:
  static constexpr int64_t kMostKept = 1 << 20;  // 4 MiB
  std::unique_ptr<float[]> own_;
  float* data_ = nullptr;
};

// Calls run(item, scratch memory of the thread) for each item, on several threads where there is enough to do, with
// `extra` floats of memory for run to share. Returns 0, or 1 when memory ran out.
template <class F>
int for_items(const Call& call, const Plan& plan, int64_t items, int64_t tiles, int64_t extra, F run) {
  const int64_t useful = std::max<int64_t>(std::min(items, tiles / kTilesPerThread), 1);
  const int threads = static_cast<int>(std::min(call.threads, useful));
  const int64_t scratch_floats = Scratch::floats(plan);
  Memory memory(threads * scratch_floats + extra);
  float* base = memory.data();
  if (!base) return 1;
#pragma omp parallel num_threads(threads)
  {
#if defined(_OPENMP)
    const int thread = omp_get_thread_num();
#else
    const int thread = 0;
#endif
    const Scratch mine(plan, base + thread * scratch_floats);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t item = 0; item < items; ++item) run(item, mine, base + threads * scratch_floats);
  }
  return 0;
}

}  // namespace

// A softcap of 0 stands for none. Returns 0, or 1 when memory ran out.
extern "C" int mikv_attend(const void* arguments, float scale, float softcap) {
  const Call& call = *static_cast<const Call*>(arguments);
  const Plan plan(call);
  const int64_t all_rows = call.batch * call.kv_heads * plan.packed_rows;
  const int64_t partial_rows = plan.splits > 1 ? all_rows * plan.splits : 0;
  const int64_t tiles = call.batch * call.kv_heads * plan.row_blocks * plan.tiles;
  Partials partials{};
  const int status = for_items(call, plan, plan.items, tiles, partial_rows * (plan.value_pad + 2),
                               [&](int64_t item, const Scratch& mine, float* rest) {
                                 const Partials all{rest, rest + partial_rows, rest + 2 * partial_rows};
                                 run_item(call, plan, scale, softcap, item, mine, all);
                                 if (item == 0) partials = all;
                               });
  // At most 2 * kItems * kRowBlock partial rows, mostly far fewer: cheaper than one more barrier.
  if (status == 0 && plan.splits > 1)
    for (int64_t row = 0; row < all_rows; ++row) merge_row(call, plan, row, partials);
  return status;
}

// Attention that slots receive, summed over query rows; `call.lse` is an input. For tier 0 of the call it is added to
// `scores`, for its last tier, the call's own tokens, to `own`: [B, H_kv, count], count strided by 1.
extern "C" int mikv_add_scores(const void* arguments, float scale, float softcap, float* scores, int64_t batch_stride,
                               int64_t head_stride, float* own) {
  const Call& call = *static_cast<const Call*>(arguments);
  const Plan plan(call);
  const int64_t items = call.batch * call.kv_heads * plan.tiles;
  const Tier& last = call.tiers[call.num_tiers - 1];
  return for_items(call, plan, items, items * plan.row_blocks, 0, [&](int64_t item, const Scratch& mine, float*) {
    const int64_t pair = item / plan.tiles, b = pair / call.kv_heads, h = pair % call.kv_heads;
    int64_t tile = item % plan.tiles;
    const bool is_own = tile >= Plan::tiles_of(call.tiers[0]);
    if (is_own) tile -= Plan::tiles_of(call.tiers[0]);
    const Tier& tier = is_own ? last : call.tiers[0];
    float* sums = is_own ? own + pair * last.count : scores + b * batch_stride + h * head_stride;
    const int64_t begin = tile * kTile, n = std::min(kTile, tier.count - begin);
    sum_tile(call, plan, tier, b, h, begin, n, scale, softcap, mine, sums + begin);
  });
}
