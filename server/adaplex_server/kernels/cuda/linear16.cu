// The product of few rows with a bfloat16 weight on Hopper: y[m, n] = sum_k x[m, k] * w[n, k] (+ bias[n]).
//
// A block takes ROWS = 64 * GROUPS outputs after another. One thread fetches boxes of the weight and of x, 64 k at a
// time, STAGES ahead, over the ends of its tiles; each of the GROUPS warpgroups multiplies its 64 outputs with TOKENS
// rows. The order of sums is that of k in steps of 16, whatever TOKENS is.
//
// Given by the compiler: TOKENS (8..128), GROUPS (1..4), STAGES, WIDE (float32 results; else bfloat16).

constexpr int ROWS = 64 * GROUPS;
constexpr int CONSUMERS = 128 * GROUPS;
constexpr int X_BYTES = TOKENS * 128;
constexpr int W_BYTES = ROWS * 128;
constexpr int W_AT = STAGES * X_BYTES;
constexpr int BARRIERS_AT = W_AT + STAGES * W_BYTES;
extern "C" __device__ const int product16_shared_bytes = BARRIERS_AT + 16 * STAGES;

struct Pipe {
  u32 base, full, empty;

  __device__ __forceinline__ u32 x(int slot) const { return base + slot * X_BYTES; }
  __device__ __forceinline__ u32 w(int slot) const { return base + W_AT + slot * W_BYTES; }
};

// The next slot, and the parity of its barriers.
struct Turn {
  int slot;
  u32 phase;

  __device__ __forceinline__ void next() {
    if (++slot == STAGES) slot = 0, phase ^= 1;
  }
};

__device__ __forceinline__ void fetch_w(const Pipe &pipe, const TensorMap *w, int slot, int step, int tile) {
  barrier_expect(pipe.full + 8 * slot, X_BYTES + W_BYTES);
  copy_box(pipe.w(slot), w, step * 64, tile * ROWS, pipe.full + 8 * slot);
}

__device__ __forceinline__ void fetch_x(const Pipe &pipe, const TensorMap *x, int slot, int step, int token) {
  copy_box(pipe.x(slot), x, step * 64, token, pipe.full + 8 * slot);
}

// By one thread.
__device__ __forceinline__ void produce(const Pipe &pipe, const TensorMap *x, const TensorMap *w, int steps, int tiles,
                                        int token) {
  int ahead = min(STAGES, steps);
  if (static_cast<int>(blockIdx.x) < tiles)
    for (int i = 0; i < ahead; i++) fetch_w(pipe, w, i, i, blockIdx.x);
  wait_for_previous_launch();
  allow_next_launch();  // x is there: the next launch may read it too
  Turn turn = {0, 1};
  bool first = true;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    for (int i = 0; i < steps; i++, turn.next()) {
      if (!first || i >= ahead) {
        barrier_wait(pipe.empty + 8 * turn.slot, turn.phase);
        fetch_w(pipe, w, turn.slot, i, tile);
      }
      fetch_x(pipe, x, turn.slot, i, token);
    }
    first = false;
  }
}

__device__ __forceinline__ void release(u32 barrier) {
  if ((threadIdx.x & 31) == 0) barrier_arrive(barrier);
}

__device__ __forceinline__ void store(const float *sums, void *y, const u16 *bias, int m, int n, int token, int row) {
  int thread = threadIdx.x & 127;
  row += (thread >> 5) * 16 + ((thread & 31) >> 2);
  token += 2 * (thread & 3);
#pragma unroll
  for (int i = 0; i < TOKENS / 8; i++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      int t = token + 8 * i + (e & 1), r = row + 8 * (e >> 1);
      if (t >= m || r >= n) continue;
      float value = sums[4 * i + e];
      if (bias != nullptr) value += widen(bias[r]);
      u64 at = static_cast<u64>(t) * n + r;
      if (WIDE) {
        static_cast<float *>(y)[at] = value;
      } else {
        static_cast<u16 *>(y)[at] = round_pair(value, 0.f) & 0xFFFF;
      }
    }
  }
}

__device__ __forceinline__ void multiply(float *sums, u32 w, u32 x) {
  u64 a = tile_descriptor(w), b = tile_descriptor(x);
  product_fence();
#pragma unroll
  for (int c = 0; c < 4; c++) multiply_shared<TOKENS>(sums, a + 2 * c, b + 2 * c);
  product_commit();
}

// grid: (blocks, 1, tiles of TOKENS rows).
extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    product16(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const u16 *bias, void *y, int m,
              int n, int steps, int tiles) {
  extern __shared__ __align__(1024) u8 memory[];
  u32 base = shared_address(memory);
  Pipe pipe = {base, base + BARRIERS_AT, base + BARRIERS_AT + 8 * STAGES};
  int group = threadIdx.x >> 7;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(pipe.full + 8 * i, 1);
      barrier_init(pipe.empty + 8 * i, 4 * GROUPS);
    }
    barrier_init_fence();
  }
  __syncthreads();
  int token = blockIdx.z * TOKENS;
  if (group == GROUPS) {
    if (threadIdx.x == CONSUMERS) produce(pipe, &x, &w, steps, tiles, token);
  } else {
    wait_for_previous_launch();  // before the first store; x comes no earlier
    Turn turn = {0, 0};
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      float sums[TOKENS / 2];
#pragma unroll
      for (int i = 0; i < TOKENS / 2; i++) sums[i] = 0.f;
      int before = 0;
      int i = 0;
      do {
        barrier_wait(pipe.full + 8 * turn.slot, turn.phase);
        multiply(sums, pipe.w(turn.slot) + group * 8192, pipe.x(turn.slot));
        product_wait<1>();
        if (i > 0) release(pipe.empty + 8 * before);
        before = turn.slot;
        turn.next();
      } while (++i < steps);
      product_wait<0>();
      product_settled<TOKENS / 2>(sums);
      release(pipe.empty + 8 * before);
      store(sums, y, bias, m, n, token, tile * ROWS + group * 64);
    }
  }
}
