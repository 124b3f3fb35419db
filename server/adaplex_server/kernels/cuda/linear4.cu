// The product of few rows with a 4-bit weight on Hopper; `linear4.py` beside it holds the layout and the arithmetic.
//
// A block owns ROWS = 64 * GROUPS outputs, TOKENS rows of x and one part of K. One thread fetches: weights, scales and
// zeros by bulk copies, x by tensor copies, STAGES steps of 128 k ahead, and the weights of the first steps before the
// launch that computes x has ended. Each of the GROUPS warpgroups expands its 64 outputs in registers, piece by piece,
// while the tensor cores multiply the piece before.
//
// Given by the compiler: TOKENS (8..128), GROUPS (1..4), STAGES, DEPTH (16 k of a piece: 2 or 4), ZEROS, GROUP (k that
// share a scale; 128 if more), ROUNDED (bfloat16 results with bias; else float32 parts).

constexpr int STEP = 128;
constexpr int ROWS = 64 * GROUPS;
constexpr int CONSUMERS = 128 * GROUPS;
constexpr int SCALES = (STEP / GROUP) * 128;  // bytes of 64 outputs' scales, or zeros, in a step

// What the fetching warps give up, where the accumulators need it; 0 elsewhere.
constexpr int CONSUMER_REGISTERS = GROUPS == 4 ? 112 : 0;

constexpr int X_BYTES = TOKENS * STEP * 2;
constexpr int WORD_BYTES = ROWS * STEP / 2;
constexpr int SCALE_BYTES = GROUPS * SCALES;
constexpr int ZERO_BYTES = ZEROS ? SCALE_BYTES : 0;
constexpr int STEP_BYTES = X_BYTES + WORD_BYTES + SCALE_BYTES + ZERO_BYTES;

constexpr int X_AT = 0;
constexpr int WORDS_AT = X_AT + STAGES * X_BYTES;
constexpr int SCALES_AT = WORDS_AT + STAGES * WORD_BYTES;
constexpr int ZEROS_AT = SCALES_AT + STAGES * SCALE_BYTES;
constexpr int PIPE_END = ZEROS_AT + STAGES * ZERO_BYTES;
constexpr int SUM_STRIDE = 272;  // bytes of one token's 64 sums, padded against bank conflicts
constexpr int SUMS_END = GROUPS * TOKENS * SUM_STRIDE;
// A byte of codes has 256 bytes of the table, though half of them stay empty: so that putting the byte in its place
// within an address takes one instruction.
constexpr int TABLE_AT = PIPE_END;
constexpr int TABLE_END = TABLE_AT + 256 * 256;
constexpr int BARRIERS_AT = TABLE_END > SUMS_END ? TABLE_END : SUMS_END;
extern "C" __device__ const int product4_shared_bytes = BARRIERS_AT + 16 * STAGES;

struct Values {
  float of[16];
};

// The table that turns a byte of two codes into two values, one copy for each bank of shared memory.
__device__ __forceinline__ void fill_table(u32 table, const Values &values, int thread) {
  for (int at = thread; at < 256 * 32; at += CONSUMERS) {
    int byte = at >> 5, lane = at & 31;
    store_shared_4(table + byte * 256 + lane * 4, round_pair(values.of[byte & 15], values.of[byte >> 4]));
  }
}

// Word `word` of a thread: the four registers of its fragment for 16 k, times the scales of its two outputs. lane: four
// times the thread's lane.
__device__ __forceinline__ void expand(u32 *a, u32 word, u32 table, u32 lane, const u32 *scale, const u32 *zero) {
#pragma unroll
  for (int f = 0; f < 4; f++) {
    a[f] = load_shared_4(table + __byte_perm(word, lane, 0x5504 | (f << 4)));
    if (ZEROS) a[f] = subtract_pair(a[f], zero[f & 1]);
    a[f] = multiply_pair(a[f], scale[f & 1]);
  }
}

__device__ __forceinline__ void read_scales(u32 *scale, u32 address) {
  u32 both = load_shared_4(address);
  scale[0] = __byte_perm(both, both, 0x1010);
  scale[1] = __byte_perm(both, both, 0x3232);
}

// What a warpgroup expands while it multiplies the piece before: 64 outputs times 16 * DEPTH k.
constexpr int PIECES = STEP / (16 * DEPTH);

struct Piece {
  u32 a[4 * DEPTH];

  // words, scales, zeros: the thread's of the step. piece: of the step.
  __device__ __forceinline__ void load(u32 words, u32 scales, u32 zeros, u32 table, u32 lane, int piece) {
    int k = piece * 16 * DEPTH;
    u32 word[DEPTH];
    load_words(word, words + k / 64 * 2048 + k % 64 / 4);
    u32 scale[2], zero[2];
#pragma unroll
    for (int c = 0; c < DEPTH; c++) {
      if (c == 0 || (GROUP == 32 && c == 2)) {
        int at = (k + c * 16) / GROUP * 128;
        read_scales(scale, scales + at);
        if (ZEROS) read_scales(zero, zeros + at);
      }
      expand(a + 4 * c, word[c], table, lane, scale, zero);
    }
  }

  static __device__ __forceinline__ void load_words(u32 *word, u32 at) {
    if (DEPTH == 4) {
      uint4 v = load_shared_16(at);
      word[0] = v.x, word[1] = v.y, word[DEPTH - 2] = v.z, word[DEPTH - 1] = v.w;
    } else {
      uint2 v = load_shared_8(at);
      word[0] = v.x, word[1] = v.y;
    }
  }
};

// The piece times its part of a step of x [TOKENS, 128].
__device__ __forceinline__ void multiply(float *sums, const Piece &w, u32 x, int piece) {
  int k = piece * 16 * DEPTH;
  u64 box = tile_descriptor(x + k / 64 * (X_BYTES / 2)) + k % 64 / 8;
  product_fence();
#pragma unroll
  for (int c = 0; c < DEPTH; c++) multiply_registers<TOKENS>(sums, w.a + 4 * c, box + 2 * c);
  product_commit();
}

struct Pipe {
  u32 base, full, empty;

  __device__ __forceinline__ u32 x(int slot) const { return base + X_AT + slot * X_BYTES; }
  __device__ __forceinline__ u32 words(int slot) const { return base + WORDS_AT + slot * WORD_BYTES; }
  __device__ __forceinline__ u32 scales(int slot) const { return base + SCALES_AT + slot * SCALE_BYTES; }
  __device__ __forceinline__ u32 zeros(int slot) const { return base + ZEROS_AT + slot * ZERO_BYTES; }
};

struct Work {
  const u8 *words;
  const u8 *scales;
  const u8 *zeros;
  int blocks;  // of 64 outputs, of the whole weight
  int span;    // steps that share scales
  int block;   // the first of this block's
  int first, count;
};

// By one thread.
__device__ __forceinline__ void fetch_weights(const Pipe &pipe, const Work &work, int step, int slot, u64 policy) {
  u32 barrier = pipe.full + 8 * slot;
  barrier_expect(barrier, STEP_BYTES);
  u64 at = static_cast<u64>(step) * work.blocks + work.block;
  copy_bulk(pipe.words(slot), work.words + at * 4096, WORD_BYTES, barrier, policy);
  at = static_cast<u64>(step / work.span) * work.blocks + work.block;
  copy_bulk(pipe.scales(slot), work.scales + at * SCALES, SCALE_BYTES, barrier, policy);
  if (ZEROS) copy_bulk(pipe.zeros(slot), work.zeros + at * SCALES, SCALE_BYTES, barrier, policy);
}

__device__ __forceinline__ void fetch_x(const Pipe &pipe, const TensorMap *map, int step, int token, int slot) {
#pragma unroll
  for (int box = 0; box < 2; box++)
    copy_box(pipe.x(slot) + box * (X_BYTES / 2), map, step * STEP + box * 64, token, pipe.full + 8 * slot);
}

// By one thread.
__device__ __forceinline__ void produce(const Pipe &pipe, const Work &work, const TensorMap *map, int token) {
  u64 policy = read_once_policy();
  int ahead = min(work.count, STAGES);
  for (int i = 0; i < ahead; i++) fetch_weights(pipe, work, work.first + i, i, policy);
  wait_for_previous_launch();
  allow_next_launch();  // x is there: the next launch may read it too
  for (int i = 0; i < ahead; i++) fetch_x(pipe, map, work.first + i, token, i);
  int slot = 0;
  u32 phase = 0;
  for (int i = STAGES; i < work.count; i++) {
    barrier_wait(pipe.empty + 8 * slot, phase);
    fetch_weights(pipe, work, work.first + i, slot, policy);
    fetch_x(pipe, map, work.first + i, token, slot);
    if (++slot == STAGES) slot = 0, phase ^= 1;
  }
}

__device__ __forceinline__ void consume(float *sums, const Pipe &pipe, int count, u32 table, int group) {
  int thread = threadIdx.x & 127;
  u32 lane = 4 * (threadIdx.x & 31);
  u32 words = group * 4096 + thread * 16;
  u32 scales = group * SCALES + (thread >> 2) * 4;
  auto load = [&](Piece &to, int slot, int piece) {
    to.load(pipe.words(slot) + words, pipe.scales(slot) + scales, pipe.zeros(slot) + scales, table, lane, piece);
  };
  Piece w[2];
  int slot = 0, before = 0;
  u32 phase = 0;
  barrier_wait(pipe.full, 0);
  load(w[0], 0, 0);
  int i = 0;
  do {
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
      multiply(sums, w[piece & 1], pipe.x(slot), piece);
      product_wait<1>();
      if (piece == 0 && i > 0 && (threadIdx.x & 31) == 0) barrier_arrive(pipe.empty + 8 * before);
      if (piece + 1 < PIECES) load(w[(piece + 1) & 1], slot, piece + 1);
    }
    before = slot;
    if (++slot == STAGES) slot = 0, phase ^= 1;
    if (i + 1 < count) {
      barrier_wait(pipe.full + 8 * slot, phase);
      load(w[0], slot, 0);
    }
  } while (++i < count);
  product_wait<0>();
  product_settled<TOKENS / 2>(sums);
}

// The warpgroup's sums to shared memory as [TOKENS, 64].
__device__ __forceinline__ void stage_sums(const float *sums, u32 at) {
  int thread = threadIdx.x & 127;
  int row = (thread >> 5) * 16 + ((thread & 31) >> 2), token = 2 * (thread & 3);
#pragma unroll
  for (int i = 0; i < TOKENS / 8; i++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      float value = sums[4 * i + e];
      int t = 8 * i + token + (e & 1), r = row + 8 * (e >> 1);
      store_shared_4(at + t * SUM_STRIDE + 4 * r, __float_as_uint(value));
    }
  }
}

struct Out {
  void *y;
  const u16 *bias;
  int m, n;      // of the whole result
  int token, row;  // the first of this warpgroup's tile
  int part;

  // Eight outputs of one token, float32, from `row + column`.
  __device__ __forceinline__ void store8(const float *v, int t, int column) const {
    int r = row + column;
    u64 at = (static_cast<u64>(part) * m + token + t) * n + r;
    bool whole = r + 8 <= n && n % 8 == 0;
    if (ROUNDED) {
      u16 *to = static_cast<u16 *>(y) + at;
      u32 pair[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float low = v[2 * i], high = v[2 * i + 1];
        if (bias != nullptr) {
          low += r + 2 * i < n ? widen(bias[r + 2 * i]) : 0.f;
          high += r + 2 * i + 1 < n ? widen(bias[r + 2 * i + 1]) : 0.f;
        }
        pair[i] = round_pair(low, high);
      }
      if (whole) {
        *reinterpret_cast<uint4 *>(to) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
      } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
          if (r + i < n) to[i] = pair[i / 2] >> (16 * (i & 1));
      }
    } else {
      float *to = static_cast<float *>(y) + at;
      if (whole) {
        reinterpret_cast<float4 *>(to)[0] = make_float4(v[0], v[1], v[2], v[3]);
        reinterpret_cast<float4 *>(to)[1] = make_float4(v[4], v[5], v[6], v[7]);
      } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
          if (r + i < n) to[i] = v[i];
      }
    }
  }
};

__device__ __forceinline__ void store_sums(const Out &out, u32 at) {
  int thread = threadIdx.x & 127, column = 8 * (thread & 7);
  for (int t = thread >> 3; t < TOKENS && out.token + t < out.m; t += 16) {
    float v[8];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      uint4 piece = load_shared_16(at + t * SUM_STRIDE + 4 * column + 16 * h);
      v[4 * h] = __uint_as_float(piece.x), v[4 * h + 1] = __uint_as_float(piece.y);
      v[4 * h + 2] = __uint_as_float(piece.z), v[4 * h + 3] = __uint_as_float(piece.w);
    }
    out.store8(v, t, column);
  }
}

// grid: (parts of K, blocks of ROWS outputs, tiles of TOKENS rows).
extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    product4(const __grid_constant__ TensorMap x, const u8 *words, const u8 *scales, const u8 *zeros,
             const __grid_constant__ Values values, const u16 *bias, void *y, int m, int n, int steps, int blocks,
             int span) {
  extern __shared__ __align__(1024) u8 memory[];
  u32 base = shared_address(memory);
  Pipe pipe = {base, base + BARRIERS_AT, base + BARRIERS_AT + 8 * STAGES};
  int group = threadIdx.x >> 7, token = blockIdx.z * TOKENS, part = blockIdx.x;
  // Every part has a step at least: there are no more parts than steps.
  int first = part * steps / gridDim.x, count = (part + 1) * steps / gridDim.x - first;
  if (threadIdx.x == CONSUMERS) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(pipe.full + 8 * i, 1);
      barrier_init(pipe.empty + 8 * i, 4 * GROUPS);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (group == GROUPS) {
    if (CONSUMER_REGISTERS > 0) fewer_registers<32>();
    Work work = {words, scales, zeros, blocks, span, static_cast<int>(blockIdx.y) * GROUPS, first, count};
    if (threadIdx.x == CONSUMERS) produce(pipe, work, &x, token);
  } else {
    if (CONSUMER_REGISTERS > 0) more_registers<CONSUMER_REGISTERS>();
    fill_table(base + TABLE_AT, values, threadIdx.x);
    sync_threads<CONSUMERS>(1);
    float sums[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) sums[i] = 0.f;
    consume(sums, pipe, count, base + TABLE_AT, group);
    wait_for_previous_launch();
    sync_threads<CONSUMERS>(1);  // x is read no more: its memory takes the sums
    Out out = {y, bias, m, n, token, static_cast<int>(blockIdx.y) * ROWS + group * 64, part};
    u32 at = base + group * TOKENS * SUM_STRIDE;
    stage_sums(sums, at);
    sync_threads<128>(2 + group);
    store_sums(out, at);
  }
}

// The weight's values to out [n, k], bfloat16: tiles of 64 outputs and 64 k, one after another in the order of the
// words, each turned in shared memory so that rows are written 128 bytes at a time.
extern "C" __global__ void __launch_bounds__(128)
    dequantize4(const uint4 *words, const u32 *scales, const u32 *zeros, const __grid_constant__ Values values,
                u16 *out, int n, int k, int blocks, int span, int tiles) {
  __shared__ __align__(128) u8 tile[64 * 144];
  __shared__ __align__(128) u8 table[256 * 128];
  allow_next_launch();
  int thread = threadIdx.x;
  u32 base = shared_address(tile), lookup = shared_address(table) + (thread & 31) * 4;
  for (int at = thread; at < 256 * 32; at += 128)
    store_shared_4(shared_address(table) + at * 4, round_pair(values.of[(at >> 5) & 15], values.of[at >> 9]));
  int row = (thread >> 5) * 16 + ((thread & 31) >> 2), column = 2 * (thread & 3);
  uint4 next = words[static_cast<u64>(blockIdx.x) * 128 + thread];
  wait_for_previous_launch();
  for (int at = blockIdx.x; at < tiles; at += gridDim.x) {
    const u32 word[4] = {next.x, next.y, next.z, next.w};
    if (at + gridDim.x < tiles) next = words[static_cast<u64>(at + gridDim.x) * 128 + thread];
    int half = at % 2, block = at / 2 % blocks, step = at / 2 / blocks;
    u64 group = (static_cast<u64>(step / span) * blocks + block) * (SCALES / 4) + (thread >> 2);
    __syncthreads();  // the table is there, and the tile before has been written out
#pragma unroll
    for (int c = 0; c < 4; c++) {
      u64 from = group + (half * 64 + c * 16) / GROUP * 32;
      u32 both = scales[from], lower = ZEROS ? zeros[from] : 0;
#pragma unroll
      for (int f = 0; f < 4; f++) {
        u32 pair = load_shared_4(lookup + ((word[c] >> (8 * f)) & 0xFF) * 128), chosen = f & 1 ? 0x3232 : 0x1010;
        if (ZEROS) pair = subtract_pair(pair, __byte_perm(lower, lower, chosen));
        pair = multiply_pair(pair, __byte_perm(both, both, chosen));
        store_shared_4(base + (row + 8 * (f & 1)) * 144 + 2 * (16 * c + 8 * (f >> 1) + column), pair);
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int r = i * 16 + thread / 8, c = thread % 8 * 8;
      uint4 v = load_shared_16(base + r * 144 + c * 2);
      u64 to = static_cast<u64>(block * 64 + r) * k + step * STEP + half * 64 + c;
      if (block * 64 + r < n && step * STEP + half * 64 + c < k) *reinterpret_cast<uint4 *>(out + to) = v;
    }
  }
}
