// Body of the tile kernel. Each tile_kernel_<isa>.cc includes this inside its
// own namespace, after `struct Simd`, with the compiler's target already set;
// so it has no guard, includes nothing, and calls no template of the standard
// library (the linker would keep one copy of those, maybe the one with
// instructions that the machine lacks).
//
// `Simd` gives: kLanesPerVector, Vf and Vi (GCC vector types of that many
// float and int32 lanes), Fma, and loads that widen each cache type in
// registers.

constexpr int kW = Simd::kLanesPerVector;
using Vf = Simd::Vf;
using Vi = Simd::Vi;

// Keys handled at a time: enough to spread the cost of the softmax, few enough
// that the next tile of every head fits in the second-level cache.
constexpr int kTile = 32;
constexpr int kMaxRows = kW < 8 ? kW : 8;
constexpr float kMinusInf = -__builtin_inff();

static inline Vf Splat(float x) { return Vf{} + x; }
static inline Vi SplatInt(int32_t x) { return Vi{} + x; }

static inline Vf Load(const float* p) {
  Vf v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

static inline void Store(float* p, Vf v) { __builtin_memcpy(p, &v, sizeof(v)); }

static inline Vf Max(Vf a, Vf b) { return a > b ? a : b; }

static inline float ReduceMax(Vf v) {
  float largest = v[0];
  for (int i = 1; i < kW; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

static inline float ReduceAdd(Vf v) {
  float lanes[kW];
  Store(lanes, v);
  for (int width = kW / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// exp(x) for x <= 0 to about one unit in the last place; exactly 0 below the
// smallest normal result. Polynomial of degree 6 on [-ln2/2, ln2/2].
static inline Vf Exp(Vf x) {
  const Vf floor = Splat(-87.33654f);
  const Vi underflow = x < floor;
  x = underflow ? floor : x;
  const Vf magic = Splat(12582912.0f);  // 1.5 * 2^23: rounds to an integer
  const Vf shifted = Simd::Fma(x, Splat(1.44269504f), magic);
  const Vf n = shifted - magic;
  Vf r = Simd::Fma(n, Splat(-0.693359375f), x);
  r = Simd::Fma(n, Splat(2.12194440e-4f), r);
  Vf p = Splat(1.3888889e-3f);
  p = Simd::Fma(p, r, Splat(8.3333333e-3f));
  p = Simd::Fma(p, r, Splat(4.1666667e-2f));
  p = Simd::Fma(p, r, Splat(1.6666667e-1f));
  p = Simd::Fma(p, r, Splat(0.5f));
  p = Simd::Fma(p, r, Splat(1.0f));
  p = Simd::Fma(p, r, Splat(1.0f));
  Vi bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  bits = ((bits - 0x4b400000) + 127) << 23;
  Vf power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return underflow ? Splat(0.0f) : p * power;
}

static inline float ExpScalar(float x) { return Exp(Splat(x))[0]; }

static inline Vf Tanh(Vf x) {
  const Vf minus_twice = x > 0.0f ? -2.0f * x : 2.0f * x;
  const Vf e = Exp(minus_twice);
  const Vf t = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -t : t;
}

// Adds up each of kW vectors: lane i of the result is the sum of v[i].
template <int kCount>
static inline void PairwiseAdd(Vf* v) {
  if constexpr (kCount > 1) {
    for (int i = 0; i < kCount / 2; ++i) {
      v[i] = Simd::AddPairs(v[2 * i], v[2 * i + 1]);
    }
    PairwiseAdd<kCount / 2>(v);
  }
}

static inline Vf SumEach(Vf* v) {
  PairwiseAdd<kW>(v);
  return Simd::RestoreOrder(v[0]);
}

// How to read one cache type, `kW` elements from element `i` on.
struct ReadF32 {
  static constexpr int kBytes = 4;
  static constexpr float kFactor = 1.0f;
  static inline Vf At(const uint8_t* row, int64_t i) {
    return Load(reinterpret_cast<const float*>(row) + i);
  }
};
struct ReadBf16 {
  static constexpr int kBytes = 2;
  static constexpr float kFactor = 1.0f;
  static inline Vf At(const uint8_t* row, int64_t i) {
    return Simd::LoadBf16(row + 2 * i);
  }
};
struct ReadF16 {
  static constexpr int kBytes = 2;
  static constexpr float kFactor = 1.0f;
  static inline Vf At(const uint8_t* row, int64_t i) {
    return Simd::LoadF16(row + 2 * i);
  }
};
struct ReadInt8 {
  static constexpr int kBytes = 1;
  static constexpr float kFactor = 1.0f;
  static inline Vf At(const uint8_t* row, int64_t i) {
    return Simd::LoadInt8(row + i);
  }
};
// e4m3 is read as the float16 with the same bits, whose exponent bias is 8
// more; the factor is taken out once, at the end.
struct ReadE4m3 {
  static constexpr int kBytes = 1;
  static constexpr float kFactor = 256.0f;
  static inline Vf At(const uint8_t* row, int64_t i) {
    return Simd::LoadE4m3(row + i);
  }
};
struct ReadE5m2 {
  static constexpr int kBytes = 1;
  static constexpr float kFactor = 1.0f;
  static inline Vf At(const uint8_t* row, int64_t i) {
    return Simd::LoadE5m2(row + i);
  }
};

// The last, incomplete vector of a row, padded with zeros.
template <typename Read>
static inline Vf Tail(const uint8_t* row, int64_t i, int64_t dim) {
  uint8_t padded[kW * Read::kBytes] = {};
  __builtin_memcpy(padded, row + i * Read::kBytes, (dim - i) * Read::kBytes);
  return Read::At(padded, 0);
}

// The keys of one tile; slots that hold no key are left out.
struct Tile {
  int count = 0;
  bool consecutive = true;  // positions and slots both rise by one
  const uint8_t* k[kTile];
  const uint8_t* v[kTile];
  int64_t position[kTile];
  int64_t slot[kTile];
};

// logits[m, j] (+)= q[m] . k[j] for a block of kRows queries.
template <typename Read, int kRows, bool kAccumulate>
static void Logits(const uint8_t* const* keys, int64_t head_offset, int count,
                   int64_t dim, const float* q, int64_t q_stride,
                   float* logits) {
  constexpr int kKeys = kW / kRows;
  const int64_t whole = dim / kW * kW;
  for (int j = 0; j < count; j += kKeys) {
    const uint8_t* row[kKeys];
    for (int t = 0; t < kKeys; ++t) {
      row[t] = keys[j + t < count ? j + t : count - 1] + head_offset;
    }
    Vf acc[kW] = {};
    for (int64_t c = 0; c < whole; c += kW) {
      Vf query[kRows];
      for (int m = 0; m < kRows; ++m) query[m] = Load(q + m * q_stride + c);
#pragma GCC unroll 16
      for (int t = 0; t < kKeys; ++t) {
        const Vf key = Read::At(row[t], c);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
          acc[m * kKeys + t] = Simd::Fma(query[m], key, acc[m * kKeys + t]);
        }
      }
    }
    if (whole < dim) {
      for (int t = 0; t < kKeys; ++t) {
        const Vf key = Tail<Read>(row[t], whole, dim);
        for (int m = 0; m < kRows; ++m) {
          acc[m * kKeys + t] = Simd::Fma(Load(q + m * q_stride + whole), key,
                                         acc[m * kKeys + t]);
        }
      }
    }
    const Vf sums = SumEach(acc);
    float lanes[kW];
    Store(lanes, sums);
    for (int m = 0; m < kRows; ++m) {
      for (int t = 0; t < kKeys; ++t) {
        float* logit = logits + m * kTile + j + t;
        *logit = kAccumulate ? *logit + lanes[m * kKeys + t]
                             : lanes[m * kKeys + t];
      }
    }
  }
}

// acc[m] = acc[m] * correction[m] + sum over j of p[m, j] * v[j], for kVectors
// vectors of the value dimension from `begin` on.
template <typename Read, int kRows, int kVectors>
static inline void Accumulate(const uint8_t* const* values,
                              int64_t head_offset, int count, int64_t begin,
                              int64_t dim, const float* p,
                              const float* correction, float* acc,
                              int64_t acc_stride) {
  Vf sums[kRows * kVectors];
  for (int m = 0; m < kRows; ++m) {
    for (int c = 0; c < kVectors; ++c) {
      sums[m * kVectors + c] =
          Load(acc + m * acc_stride + begin + c * kW) * correction[m];
    }
  }
  if (begin + kVectors * kW <= dim) {
    for (int j = 0; j < count; ++j) {
      const uint8_t* row = values[j] + head_offset;
      Vf value[kVectors];
#pragma GCC unroll 16
      for (int c = 0; c < kVectors; ++c) {
        value[c] = Read::At(row, begin + c * kW);
      }
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const Vf weight = Splat(p[m * kTile + j]);
#pragma GCC unroll 16
        for (int c = 0; c < kVectors; ++c) {
          sums[m * kVectors + c] =
              Simd::Fma(weight, value[c], sums[m * kVectors + c]);
        }
      }
    }
  } else {
    static_assert(kVectors >= 1, "the tail is handled one vector at a time");
    for (int j = 0; j < count; ++j) {
      const Vf value = Tail<Read>(values[j] + head_offset, begin, dim);
      for (int m = 0; m < kRows; ++m) {
        sums[m * kVectors] = Simd::Fma(Splat(p[m * kTile + j]), value,
                                       sums[m * kVectors]);
      }
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int c = 0; c < kVectors; ++c) {
      Store(acc + m * acc_stride + begin + c * kW, sums[m * kVectors + c]);
    }
  }
}

template <typename Read, int kRows>
static void WeightedSum(const uint8_t* const* values, int64_t head_offset,
                        int count, int64_t dim, const float* p,
                        const float* correction, float* acc,
                        int64_t acc_stride) {
  constexpr int kRegisters = kW == 16 ? 16 : 8;
  constexpr int kVectors = kRows >= kRegisters
                               ? 1
                               : (kRegisters / kRows > 8 ? 8
                                                         : kRegisters / kRows);
  int64_t c = 0;
  for (; c + kVectors * kW <= dim; c += kVectors * kW) {
    Accumulate<Read, kRows, kVectors>(values, head_offset, count, c, dim, p,
                                      correction, acc, acc_stride);
  }
  if constexpr (kVectors > 4) {
    for (; c + 4 * kW <= dim; c += 4 * kW) {
      Accumulate<Read, kRows, 4>(values, head_offset, count, c, dim, p,
                                 correction, acc, acc_stride);
    }
  }
  for (; c < dim; c += kW) {
    Accumulate<Read, kRows, 1>(values, head_offset, count, c, dim, p,
                               correction, acc, acc_stride);
  }
}

// Soft cap, ALiBi, bias and masks on the logits of one query row.
static void Adjust(const Problem& problem, const Task& task, const Tile& tile,
                   int64_t head, int64_t row, float* logits) {
  const Masking& masking = problem.masking;
  const int64_t token = row / problem.group;
  const int64_t q_head = head * problem.group + row % problem.group;
  const Sequence& sequence = problem.sequences[task.sequence];
  const KeyRange range = VisibleKeys(masking, sequence, token);
  const int padded = (tile.count + kW - 1) / kW * kW;
  if (masking.softcap > 0.0f) {
    const Vf cap = Splat(masking.softcap);
    const Vf inverse = Splat(1.0f / masking.softcap);
    for (int j = 0; j < padded; j += kW) {
      Store(logits + j, cap * Tanh(Load(logits + j) * inverse));
    }
  }
  if (masking.alibi != nullptr) {
    const float slope = masking.alibi[q_head];
    const int64_t position = sequence.first_query + token;
    for (int j = 0; j < tile.count; ++j) {
      const int64_t distance = position - tile.position[j];
      logits[j] -=
          slope * static_cast<float>(distance < 0 ? -distance : distance);
    }
  }
  if (masking.bias.data != nullptr) {
    const PerLogit<float>& bias = masking.bias;
    const float* add = bias.data + task.sequence * bias.batch_stride +
                       q_head * bias.head_stride + token * bias.token_stride;
    const int64_t first = problem.addressing.first_slot;
    for (int j = 0; j < tile.count; ++j) {
      logits[j] += add[(tile.slot[j] - first) * bias.slot_stride];
    }
  }
  if (masking.mask.data != nullptr) {
    const PerLogit<uint8_t>& mask = masking.mask;
    const uint8_t* keep = mask.data + task.sequence * mask.batch_stride +
                          q_head * mask.head_stride +
                          token * mask.token_stride;
    const int64_t first = problem.addressing.first_slot;
    for (int j = 0; j < tile.count; ++j) {
      if (!keep[(tile.slot[j] - first) * mask.slot_stride]) {
        logits[j] = kMinusInf;
      }
    }
  }
  if (tile.consecutive && tile.position[0] >= range.begin &&
      tile.position[0] + tile.count <= range.end) {
    return;
  }
  for (int j = 0; j < tile.count; ++j) {
    if (tile.position[j] < range.begin || tile.position[j] >= range.end) {
      logits[j] = kMinusInf;
    }
  }
}

// One step of the online softmax: turns the logits of a row into weights.
// Returns the factor for what was summed before.
static inline float Softmax(float* logits, int count, float* largest,
                            float* sum) {
  const int padded = (count + kW - 1) / kW * kW;
  for (int j = count; j < padded; ++j) logits[j] = kMinusInf;
  Vf highest = Load(logits);
  for (int j = kW; j < padded; j += kW) {
    highest = Max(highest, Load(logits + j));
  }
  const float before = *largest;
  float now = ReduceMax(highest);
  if (before > now) now = before;
  // A row that has seen no key yet must not compute inf - inf.
  const float base = now == kMinusInf ? 0.0f : now;
  Vf total = {};
  for (int j = 0; j < padded; j += kW) {
    const Vf p = Exp(Load(logits + j) - base);
    Store(logits + j, p);
    total += p;
  }
  const float correction =
      before == now ? 1.0f : (before == kMinusInf ? 0.0f
                                                  : ExpScalar(before - base));
  *largest = now;
  *sum = *sum * correction + ReduceAdd(total);
  return correction;
}

template <typename Read, int kRows>
static void Block(const Problem& problem, const Task& task, const Tile& tile,
                  const uint8_t* const* keys, int64_t k_offset,
                  const uint8_t* const* values, int64_t v_offset,
                  int64_t head, int64_t row, int64_t rows) {
  const int64_t k_pad = PadToLanes(problem.shape.k_dim);
  const int64_t v_pad = PadToLanes(problem.shape.v_dim);
  const int64_t per_head = problem.rows_per_head();
  const int64_t q_row = head * (per_head + kRowSlack) + row;
  const int64_t state = head * per_head + row;
  float logits[kRows * kTile];
  float correction[kRows];
  Logits<Read, kRows, false>(keys, k_offset, tile.count, problem.shape.k_dim,
                             task.q + q_row * k_pad, k_pad, logits);
  if (task.qv != nullptr) {
    Logits<Read, kRows, true>(values, v_offset, tile.count,
                              problem.shape.v_dim, task.qv + q_row * v_pad,
                              v_pad, logits);
  }
  for (int m = 0; m < kRows; ++m) {
    if (m < rows) {
      Adjust(problem, task, tile, head, row + m, logits + m * kTile);
      correction[m] =
          Softmax(logits + m * kTile, tile.count,
                  task.out.largest + state + m, task.out.sum + state + m);
    } else {
      // Rows past the end compute on zeros; their sums land in the slack.
      for (int j = 0; j < kTile; ++j) logits[m * kTile + j] = 0.0f;
      correction[m] = 0.0f;
    }
  }
  if (rows == kRows) {
    WeightedSum<Read, kRows>(values, v_offset, tile.count,
                             problem.shape.v_dim, logits, correction,
                             task.out.acc + state * v_pad, v_pad);
  } else {
    for (int64_t m = 0; m < rows; ++m) {
      WeightedSum<Read, 1>(values, v_offset, tile.count, problem.shape.v_dim,
                           logits + m * kTile, correction + m,
                           task.out.acc + (state + m) * v_pad, v_pad);
    }
  }
}

template <typename Read>
static void Rows(const Problem& problem, const Task& task, const Tile& tile,
                 const uint8_t* const* keys, int64_t k_offset,
                 const uint8_t* const* values, int64_t v_offset,
                 int64_t head) {
  int64_t row = task.row_begin;
  while (row < task.row_end) {
    const int64_t left = task.row_end - row;
    if constexpr (kMaxRows >= 8) {
      if (left > 4) {
        Block<Read, 8>(problem, task, tile, keys, k_offset, values, v_offset,
                       head, row, left < 8 ? left : 8);
        row += 8;
        continue;
      }
    }
    if (left > 2) {
      Block<Read, 4>(problem, task, tile, keys, k_offset, values, v_offset,
                     head, row, left < 4 ? left : 4);
      row += 4;
    } else if (left == 2) {
      Block<Read, 2>(problem, task, tile, keys, k_offset, values, v_offset,
                     head, row, 2);
      row += 2;
    } else {
      Block<Read, 1>(problem, task, tile, keys, k_offset, values, v_offset,
                     head, row, 1);
      row += 1;
    }
  }
}

// Collects the next keys of [slot, task.slot_end); returns the slot after them.
template <typename Read>
static int64_t FillTile(const Problem& problem, const Task& task, int64_t slot,
                        Tile* tile) {
  const kv_cache::Addressing& addressing = problem.addressing;
  const int64_t last = problem.sequences[task.sequence].num_keys - 1;
  const int64_t k_bytes = problem.shape.k_dim * Read::kBytes;
  const int64_t v_bytes = problem.shape.v_dim * Read::kBytes;
  tile->count = 0;
  tile->consecutive = true;
  while (slot < task.slot_end && tile->count < kTile) {
    int64_t row = addressing.RowOf(problem.shape, task.sequence, slot);
    const int64_t size = problem.shape.block_size;
    const int64_t in_block = (slot - addressing.first_slot) % size;
    int64_t stop = slot + (size - in_block);
    if (stop > task.slot_end) stop = task.slot_end;
    if (row < 0) {
      slot = stop;
      continue;
    }
    for (; slot < stop && tile->count < kTile; ++slot) {
      int64_t position = slot;
      if (addressing.ring > 0) {
        // The newest position that lies in this slot.
        const int64_t behind = (last - slot) % addressing.ring;
        position = last - (behind < 0 ? behind + addressing.ring : behind);
      }
      if (position >= 0 && position <= last) {
        const int i = tile->count++;
        tile->k[i] = problem.cache_k + row * k_bytes;
        tile->v[i] = problem.cache_v + row * v_bytes;
        tile->position[i] = position;
        tile->slot[i] = slot;
        if (position != tile->position[0] + i) tile->consecutive = false;
      }
      row += problem.shape.slot_stride();
    }
  }
  return slot;
}

template <typename Read>
static inline void Prefetch(const Tile& tile, int64_t k_offset,
                            int64_t v_offset, int64_t k_bytes,
                            int64_t v_bytes) {
  for (int j = 0; j < tile.count; ++j) {
    for (int64_t i = 0; i < k_bytes; i += 64) {
      __builtin_prefetch(tile.k[j] + k_offset + i, 0, 2);
    }
    for (int64_t i = 0; i < v_bytes; i += 64) {
      __builtin_prefetch(tile.v[j] + v_offset + i, 0, 2);
    }
  }
}

template <typename Read>
static void Widen(const uint8_t* const* rows, int64_t offset, int count,
                  int64_t dim, int64_t padded, float* out) {
  for (int j = 0; j < count; ++j) {
    int64_t c = 0;
    for (; c + kW <= dim; c += kW) {
      Store(out + j * padded + c, Read::At(rows[j] + offset, c));
    }
    if (c < dim) {
      Store(out + j * padded + c, Tail<Read>(rows[j] + offset, c, dim));
    }
  }
}

template <typename Read>
static void Run(const Problem& problem, const Task& task) {
  const kv_cache::CacheShape& shape = problem.shape;
  const int64_t per_head = problem.rows_per_head();
  const int64_t k_pad = PadToLanes(shape.k_dim);
  const int64_t v_pad = PadToLanes(shape.v_dim);
  const int64_t k_bytes = shape.k_dim * Read::kBytes;
  const int64_t v_bytes = shape.v_dim * Read::kBytes;
  for (int64_t n = task.head_begin; n < task.head_end; ++n) {
    const int64_t first = n * per_head + task.row_begin;
    const int64_t rows = task.row_end - task.row_begin;
    for (int64_t r = 0; r < rows; ++r) {
      task.out.largest[first + r] = kMinusInf;
      task.out.sum[first + r] = 0.0f;
    }
    __builtin_memset(task.out.acc + first * v_pad, 0,
                     rows * v_pad * sizeof(float));
  }
  // With many query rows a tile is widened once and read many times.
  const bool widen = task.row_end - task.row_begin > 8;
  float* wide_k = nullptr;
  const uint8_t* wide_keys[kTile];
  const uint8_t* wide_values[kTile];
  if (widen) {
    wide_k = static_cast<float*>(
        __builtin_malloc(kTile * (k_pad + v_pad) * sizeof(float)));
    float* wide_v = wide_k + kTile * k_pad;
    for (int j = 0; j < kTile; ++j) {
      wide_keys[j] = reinterpret_cast<const uint8_t*>(wide_k + j * k_pad);
      wide_values[j] = reinterpret_cast<const uint8_t*>(wide_v + j * v_pad);
    }
  }
  Tile tiles[2];
  int now = 0;
  int64_t slot = FillTile<Read>(problem, task, task.slot_begin, &tiles[now]);
  while (tiles[now].count > 0) {
    const Tile& tile = tiles[now];
    Tile& next = tiles[1 - now];
    slot = FillTile<Read>(problem, task, slot, &next);
    for (int64_t n = task.head_begin; n < task.head_end; ++n) {
      const int64_t k_offset = n * shape.head_stride() * k_bytes;
      const int64_t v_offset = n * shape.head_stride() * v_bytes;
      Prefetch<Read>(next, k_offset, v_offset, k_bytes, v_bytes);
      if (widen) {
        Widen<Read>(tile.k, k_offset, tile.count, shape.k_dim, k_pad, wide_k);
        Widen<Read>(tile.v, v_offset, tile.count, shape.v_dim, v_pad,
                    wide_k + kTile * k_pad);
        Rows<ReadF32>(problem, task, tile, wide_keys, 0, wide_values, 0, n);
      } else {
        Rows<Read>(problem, task, tile, tile.k, k_offset, tile.v, v_offset, n);
      }
    }
    now = 1 - now;
  }
  if (widen) __builtin_free(wide_k);
}

static void RunAny(const Problem& problem, const Task& task) {
  switch (problem.element) {
    case kv_cache::Element::kF32:
      return Run<ReadF32>(problem, task);
    case kv_cache::Element::kBf16:
      return Run<ReadBf16>(problem, task);
    case kv_cache::Element::kF16:
      return Run<ReadF16>(problem, task);
    case kv_cache::Element::kInt8:
      return Run<ReadInt8>(problem, task);
    case kv_cache::Element::kE4m3:
      return Run<ReadE4m3>(problem, task);
    case kv_cache::Element::kE5m2:
      return Run<ReadE5m2>(problem, task);
  }
}
