// Hopper's own instructions (sm_90a) as functions: barriers in shared memory, bulk and tensor copies, and the
// matrix product of a warpgroup. PTX ISA 8.x is the source of every operand order and descriptor field.
//
// Addresses of shared memory are 32-bit numbers in the shared window.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct __align__(64) TensorMap {
  u64 opaque[16];
};

__device__ __forceinline__ u32 shared_address(const void *pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// ---- barriers

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival, and `bytes` that copies will bring before the phase ends.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 phase) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra.uni again; }" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

template <int THREADS> __device__ __forceinline__ void sync_threads(u32 name) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "n"(THREADS) : "memory");
}

// Registers a thread, of all threads of a warpgroup; a multiple of 8.
template <int COUNT> __device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT> __device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- the launch before this one

// Its results may be read, and what it reads overwritten, only after this.
__device__ __forceinline__ void wait_for_previous_launch() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void allow_next_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- copies

__device__ __forceinline__ u64 read_once_policy() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// bytes: a multiple of 16; both addresses too.
__device__ __forceinline__ void copy_bulk(u32 to, const void *from, u32 bytes, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
      ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void copy_box(u32 to, const TensorMap *map, int x, int y, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      ::"r"(to), "l"(map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ uint4 load_shared_16(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

__device__ __forceinline__ uint2 load_shared_8(u32 address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}

__device__ __forceinline__ u32 load_shared_4(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

__device__ __forceinline__ void store_shared_4(u32 address, u32 value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// ---- bfloat16

__device__ __forceinline__ u32 multiply_pair(u32 a, u32 b) {
  u32 c;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}

__device__ __forceinline__ u32 subtract_pair(u32 a, u32 b) {
  u32 c;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}

__device__ __forceinline__ u32 round_pair(float low, float high) {
  u32 c;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(c) : "f"(high), "f"(low));
  return c;
}

__device__ __forceinline__ float widen(u16 value) { return __uint_as_float(static_cast<u32>(value) << 16); }

// ---- the matrix product of a warpgroup: d [64, N] += a [64, 16] * b [N, 16]^T, bfloat16 to float32

__device__ __forceinline__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING> __device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// After the last wait: no use of the accumulators moves before it.
template <int COUNT> __device__ __forceinline__ void product_settled(float *d) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Rows of 128 bytes (64 values), swizzled by 128 bytes, groups of eight rows 1024 bytes apart.
__device__ __forceinline__ u64 tile_descriptor(u32 address) {
  return (1ull << 62) | (64ull << 32) | (1ull << 16) | ((address & 0x3FFFF) >> 4);
}

template <int N> struct Product;

// The accumulators of a tile are written out, since assembly cannot name an array's elements.
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D8(i) D4(i), D4(i + 4)
#define D16(i) D8(i), D8(i + 8)

#define PRODUCT(N, NAMES, A, DESC, ...)                                                                                \
  template <> struct Product<N> {                                                                                      \
    static __device__ __forceinline__ void registers(float *d, const u32 *a, u64 b) {                                 \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES "}, {" A "}, " DESC              \
                   ", 1, 1, 1, 0;"                                                                                     \
                   : __VA_ARGS__                                                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                              \
    }                                                                                                                  \
    static __device__ __forceinline__ void shared(float *d, u64 a, u64 b) {                                           \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES "}, " FIRST_##N                  \
                   : __VA_ARGS__                                                                                       \
                   : "l"(a), "l"(b));                                                                                  \
    }                                                                                                                  \
  };

#define FIRST_8 "%4, %5, 1, 1, 1, 0, 0;"
#define FIRST_16 "%8, %9, 1, 1, 1, 0, 0;"
#define FIRST_32 "%16, %17, 1, 1, 1, 0, 0;"
#define FIRST_64 "%32, %33, 1, 1, 1, 0, 0;"
#define NAMES_8 "%0,%1,%2,%3"
#define NAMES_16 NAMES_8 ",%4,%5,%6,%7"
#define NAMES_32 NAMES_16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES_64 NAMES_32 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"

PRODUCT(8, NAMES_8, "%4,%5,%6,%7", "%8", D4(0))
PRODUCT(16, NAMES_16, "%8,%9,%10,%11", "%12", D8(0))
PRODUCT(32, NAMES_32, "%16,%17,%18,%19", "%20", D16(0))
PRODUCT(64, NAMES_64, "%32,%33,%34,%35", "%36", D16(0), D16(16))

// Any multiple of eight tokens, in pieces that the instruction is written for above. b: of the first token; 16 k.
template <int COUNT> __device__ __forceinline__ void multiply_registers(float *d, const u32 *a, u64 b) {
  constexpr int WHOLE = COUNT & ~63, HALF = COUNT & ~31, QUARTER = COUNT & ~15;
#pragma unroll
  for (int t = 0; t < WHOLE; t += 64) Product<64>::registers(d + t / 2, a, b + t * 8);
  if (COUNT & 32) Product<32>::registers(d + WHOLE / 2, a, b + WHOLE * 8);
  if (COUNT & 16) Product<16>::registers(d + HALF / 2, a, b + HALF * 8);
  if (COUNT & 8) Product<8>::registers(d + QUARTER / 2, a, b + QUARTER * 8);
}

template <int COUNT> __device__ __forceinline__ void multiply_shared(float *d, u64 a, u64 b) {
  constexpr int WHOLE = COUNT & ~63, HALF = COUNT & ~31, QUARTER = COUNT & ~15;
#pragma unroll
  for (int t = 0; t < WHOLE; t += 64) Product<64>::shared(d + t / 2, a, b + t * 8);
  if (COUNT & 32) Product<32>::shared(d + WHOLE / 2, a, b + WHOLE * 8);
  if (COUNT & 16) Product<16>::shared(d + HALF / 2, a, b + HALF * 8);
  if (COUNT & 8) Product<8>::shared(d + QUARTER / 2, a, b + QUARTER * 8);
}
