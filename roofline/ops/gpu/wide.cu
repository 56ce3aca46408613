// Linears of 17 to some hundred tokens by INT8 weights, on Hopper's tensor cores (`wgmma`).
//
// Weights are the left operand and come from registers: a lane brings 16 bytes of a row of 64
// columns by `cp.async`, makes floats of them (7 instructions for 4) and multiplies. Activations
// are the right operand, from shared memory: `norms.lay` has laid them out as `wgmma` wants them,
// in the order of columns in which a lane holds its weights, so that a step's are one bulk copy.
// Sums stay in one set of registers, in units of the scale of the group at hand: between groups
// they are multiplied by the quotient of two scales.
//
// A warp has 16 rows and a block up to 16 warps, which share activations: those are what the
// second cache has to bring again and again. Where rows are few, the blocks of a cluster share K
// and add up what they have through each other's shared memory, always in the same order.
//
// Compiled by NVRTC (`nvrtc.py`) with these macros, by `wide.py`:
//   TOKENS: of a tile, 32, 64, 96 or 128
//   DEPTH, HELD: steps of 128 columns that are on their way, of weights and of activations
//   GIVEN 1: activations are bfloat16, 2: float16
//   KIND 0: out = product; 1: out = silu(gate) * up, the two halves of the rows
//   RESULT 0: out is float32, 1: bfloat16, 2: float16
//   EVEN: K is a multiple of 128
//   PDL

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef signed char i8;
typedef long long i64;

#define SUMS (TOKENS / 2)              // of a lane: rows g and g + 8, tokens 8 n + 2 t and + 1
#define HALF (TOKENS * 128)            // bytes of 64 columns of a tile of tokens
#define SLOT (16 * 128 + 16 * 4)       // bytes of a warp's step: weights and their scales
#define SMALLEST_SCALE 1e-30f          // so that quotients of scales are finite

template <int N> struct Number {};
__device__ __forceinline__ void put(float *place, float value, Number<0>) { *place = value; }
__device__ __forceinline__ void put(u16 *place, float value, Number<1>) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(*place) : "f"(value));
}
__device__ __forceinline__ void put(u16 *place, float value, Number<2>) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(*place) : "f"(value));
}
template <int N> struct Stored { typedef u16 type; };
template <> struct Stored<0> { typedef float type; };
typedef Stored<RESULT>::type Result;

__device__ __forceinline__ void bring(u32 to, const void *from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from));
}

__device__ __forceinline__ void bring_scale(u32 to, const float *from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from));
}

__device__ __forceinline__ void wait_for(u32 barrier, u32 phase) {
  asm volatile("{\n"
               ".reg .pred done;\n"
               "again:\n"
               "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@!done bra again;\n"
               "}" ::"r"(barrier), "r"(phase) : "memory");
}

#if GIVEN == 1
#define LARGE 0x43004300 // 128, whose last place is 1
#else
#define LARGE 0x64806480 // 1024 + 128
#endif

// Four weights as floats, in the order 0, 2, 1, 3: exact, as a small number is added to the last
// places of a large one and taken away. `large` is LARGE in a register, for an instruction has
// room for one constant.
__device__ __forceinline__ void widen(u32 bytes, u32 large, u32 &even, u32 &odd) {
  const u32 word[2] = {bytes, bytes >> 8};
  u32 found[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
#if GIVEN == 1 // (128 + low 7 bits) - (128 or, if negative, 256)
    const u32 plus = (word[i] & 0x007f007f) | large, minus = (word[i] & 0x00800080) | large;
    asm volatile("sub.rn.bf16x2 %0, %1, %2;" : "=r"(found[i]) : "r"(plus), "r"(minus));
#else // 1024 + (128 + value) - 1152
    const u32 plus = (word[i] & 0x00ff00ff) ^ large;
    asm volatile("sub.rn.f16x2 %0, %1, %2;" : "=r"(found[i]) : "r"(plus), "r"(large));
#endif
  }
  even = found[0], odd = found[1];
}

// The left operands of 64 columns: 16 bytes of row g and of row g + 8.
__device__ __forceinline__ void widen(uint4 low, uint4 high, u32 large, u32 (&a)[4][4]) {
  widen(low.x, large, a[0][0], a[0][2]), widen(high.x, large, a[0][1], a[0][3]);
  widen(low.y, large, a[1][0], a[1][2]), widen(high.y, large, a[1][1], a[1][3]);
  widen(low.z, large, a[2][0], a[2][2]), widen(high.z, large, a[2][1], a[2][3]);
  widen(low.w, large, a[3][0], a[3][2]), widen(high.w, large, a[3][1], a[3][3]);
}

__device__ __forceinline__ uint4 load(u32 from) { // where it stands, and not before
  uint4 found;
  asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w) : "r"(from) : "memory");
  return found;
}

#define D0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define D1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define D2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define D3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define R16(i) R4(i), R4(i + 4), R4(i + 8), R4(i + 12)
#if TOKENS == 32
#define SHAPE "m64n32k16"
#define D "{" D0 "}"
#define A "{%16, %17, %18, %19}, %20, 1, 1, 1, 0;"
#define R R16(0)
#elif TOKENS == 64
#define SHAPE "m64n64k16"
#define D "{" D0 ", " D1 "}"
#define A "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
#define R R16(0), R16(16)
#elif TOKENS == 96
#define SHAPE "m64n96k16"
#define D "{" D0 ", " D1 ", " D2 "}"
#define A "{%48, %49, %50, %51}, %52, 1, 1, 1, 0;"
#define R R16(0), R16(16), R16(32)
#else
#define SHAPE "m64n128k16"
#define D "{" D0 ", " D1 ", " D2 ", " D3 "}"
#define A "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
#define R R16(0), R16(16), R16(32), R16(48)
#endif
#if GIVEN == 1
#define TYPES ".f32.bf16.bf16 "
#else
#define TYPES ".f32.f16.f16 "
#endif

// d [64 rows, TOKENS] += a [64, 16] b [16, TOKENS], asynchronously
__device__ __forceinline__ void multiply(float (&d)[SUMS], const u32 (&a)[4], u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned." SHAPE TYPES D ", " A
               : R
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <int N> __device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void hold(float (&d)[SUMS]) { // registers are as they stand from here on
#pragma unroll
  for (int i = 0; i < SUMS; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// The matrix row of row r of 16 of a slab; rows 8 to 15 are partners of 0 to 7 where KIND needs it.
__device__ __forceinline__ int row_of(int slab, int r, int N) {
#if KIND == 1
  return slab * 8 + r % 8 + r / 8 * (N / 2);
#else
  return slab * 16 + r;
#endif
}

__device__ __forceinline__ float paired(float gate, float up) {
  return gate / (1 + __expf(-gate)) * up;
}

extern "C" __global__ void __launch_bounds__(512, 1)
wide(const u16 *given,    // [2 ceil(K / 128), given_tokens, 64], see `norms.lay`
     const i8 *weight,    // [N, K], N a multiple of 16, K of 64
     const float *scales, // [N, ceil(K / 128)]
     void *out,           // [T, out_stride]: N, or N / 2 of a pair
     int *infinite,       // [1], set where a product is NaN or infinite; or null
     int T, int N, int K,
     int given_tokens, // T, up to a multiple of 8
     int slabs,        // of 16 rows, of a block: no more than it has warps
     int row_tiles, int token_tiles, int out_stride) {
#if PDL
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  extern __shared__ __align__(1024) char shared[]; // [HELD, 2, TOKENS, 128]; [warps, DEPTH] slots
  __shared__ u64 full[HELD]; // activations of a step are there
  __shared__ u32 left[HELD]; // warps that have multiplied by them
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  int rank, blocks, cluster, clusters;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(cluster));
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(clusters));

  // Of K this block has `steps` from `first_step` on.
  const int all_steps = (K + 127) / 128;
  const int first_step = all_steps * rank / blocks;
  const int steps = all_steps * (rank + 1) / blocks - first_step;
  const int tiles = row_tiles * token_tiles;

  char *const ring = shared + HELD * 2 * HALF + warp * DEPTH * SLOT;
  const u32 shared_place = (u32)__cvta_generic_to_shared(shared);
  const u32 ring_place = (u32)__cvta_generic_to_shared(ring);
  const u32 full_place = (u32)__cvta_generic_to_shared(full);
  const u32 left_place = (u32)__cvta_generic_to_shared(left);

  // Weights on their way: the step that the pointers are at, and where it goes.
  const i8 *values[2];
  const float *their_scales;
  int coming = 0, coming_tile = cluster;
  u32 coming_place = ring_place;
  bool has_rows = false;
  auto find = [&]() {
    const int slab = coming_tile / token_tiles * slabs + warp;
    has_rows = coming_tile < tiles && warp < slabs && slab < N / 16;
    if (!has_rows) return;
    values[0] = weight + (i64)row_of(slab, g, N) * K + first_step * 128 + 16 * t;
    values[1] = weight + (i64)row_of(slab, g + 8, N) * K + first_step * 128 + 16 * t;
    their_scales = scales + (i64)row_of(slab, lane % 16, N) * all_steps + first_step;
  };
  auto bring_step = [&]() {
    if (has_rows) {
#if EVEN
      const int further = 64;
#else // past the end of K any weights will do: activations are zero there
      const int further = (first_step + coming) * 128 + 64 < K ? 64 : 0;
#endif
#pragma unroll
      for (int h = 0; h < 2; h++) {
        bring(coming_place + h * 512 + 16 * lane, values[h]);
        bring(coming_place + 1024 + h * 512 + 16 * lane, values[h] + further);
        values[h] += 128;
      }
      if (lane < 16) bring_scale(coming_place + 2048 + 4 * lane, their_scales);
      their_scales++;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    coming_place = coming_place == ring_place + (DEPTH - 1) * SLOT ? ring_place
                                                                  : coming_place + SLOT;
    if (++coming == steps) {
      coming = 0;
      coming_tile += clusters;
      find();
    }
  };

  // Activations on their way; a step is asked for by one lane.
  int given_step = steps, given_tile = cluster - clusters;
  u32 given_bytes = 0;
  const u16 *given_now = given;
  auto pass_given = [&]() {
    given_now += (i64)given_tokens * 128;
    if (given_step++ < steps - 1) return;
    given_step = 0;
    given_tile += clusters;
    const int token = given_tile % token_tiles * TOKENS;
    given_bytes = min(TOKENS, given_tokens - token) * 128;
    given_now = given + ((i64)2 * first_step * given_tokens + token) * 64;
  };
  auto bring_given = [&](int slot) {
    const u32 barrier = full_place + 8 * slot, to = shared_place + slot * 2 * HALF;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(2 * given_bytes) : "memory");
#pragma unroll
    for (int half = 0; half < 2; half++)
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], "
                   "%2, [%3];" ::"r"(to + half * HALF),
                   "l"(given_now + half * given_tokens * 64), "r"(given_bytes), "r"(barrier)
                   : "memory");
  };
  pass_given();

  find();
#pragma unroll
  for (int d = 0; d < DEPTH; d++) bring_step();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int slot = 0; slot < HELD; slot++) {
      left[slot] = 0;
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full_place + 8 * slot));
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
#if PDL
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  for (int slot = 0; slot < HELD; slot++) {
    if (threadIdx.x == 0 && given_tile < tiles) bring_given(slot);
    pass_given();
  }

  float sums[SUMS];
  float scale[2] = {1, 1}; // that the sums are in units of
  const u32 large = LARGE ^ (T < 0); // the compiler does not know it
  int held = 0; // the slot of this step's activations
  u32 place = ring_place, phase = 0;
  // The warp has multiplied by what is in a slot: the last one to say so lets it be written over.
  // Relaxed: a fence would wait for the weights that are on their way.
  auto leave = [&](int slot) {
    if (lane == 0) {
      u32 before;
      asm volatile("atom.relaxed.cta.shared::cta.inc.u32 %0, [%1], %2;" : "=r"(before)
                   : "r"(left_place + 4 * slot), "r"(warps - 1) : "memory");
      if (before == warps - 1 && given_tile < tiles) bring_given(slot);
    }
    pass_given();
  };

  for (int tile = cluster; tile < tiles; tile += clusters) {
#pragma unroll
    for (int i = 0; i < SUMS; i++) sums[i] = 0;
    for (int step = 0; step < steps; step++) {
      asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
      __syncwarp(); // scales come by other lanes
      u32 a[4][4], b[4][4];
      wait_for_products<1>(); // whose operand `a` was
      const uint4 *const weights = (const uint4 *)(shared + (place - shared_place)) + lane;
      widen(weights[0], weights[32], large, a);
      float ratio[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float now = *(const float *)(shared + (place - shared_place) + 2048 + 4 * g + 32 * h);
        float inverse;
        if (fabsf(now) < SMALLEST_SCALE) now = SMALLEST_SCALE;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(now));
        ratio[h] = scale[h] * inverse;
        scale[h] = now;
      }
      wait_for(full_place + 8 * held, phase); // here, or `a` would be made after the products
      wait_for_products<0>();
      hold(sums);
#pragma unroll
      for (int i = 0; i < SUMS; i++) sums[i] *= ratio[i / 2 % 2];

      // Rows of 128 bytes whose 16 bytes have changed places, eight rows after eight.
      const u64 start = (shared_place + held * 2 * HALF) >> 4;
      const u64 operand = start | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
      hold(sums);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < 4; k++) multiply(sums, a[k], operand + 2 * k);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");

      widen(load(place + 16 * lane + 1024), load(place + 16 * lane + 1536), large, b);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < 4; k++) multiply(sums, b[k], operand + HALF / 16 + 2 * k);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      if (step > 0) leave(held == 0 ? HELD - 1 : held - 1);
      held = held + 1 == HELD ? 0 : held + 1;
      phase ^= held == 0;
      place = place == ring_place + (DEPTH - 1) * SLOT ? ring_place : place + SLOT;
      __syncwarp(); // all have read their weights' scales: the slot may be written
      bring_step();
    }
    wait_for_products<0>();
    hold(sums);
    leave(held == 0 ? HELD - 1 : held - 1);
    const int first_token = tile % token_tiles * TOKENS;
    const int first_slab = tile / token_tiles * slabs;
    if (blocks == 1) {
      const int slab = first_slab + warp;
      if (warp < slabs && slab < N / 16) {
#pragma unroll
        for (int i = 0; i < SUMS; i += i % 4 == 1 ? 3 : 1) { // rows g and g + 8: i and i + 2
          const int token = first_token + i / 4 * 8 + 2 * t + i % 2;
          const float first = sums[i] * scale[0], second = sums[i + 2] * scale[1];
          Result *const line = (Result *)out + (i64)token * out_stride;
          if (token < T) {
#if KIND == 0
            put(line + slab * 16 + g, first, Number<RESULT>());
            put(line + slab * 16 + g + 8, second, Number<RESULT>());
            const float most = __uint_as_float(0x7f800000);
            if (infinite != 0 && !(fabsf(first) < most && fabsf(second) < most)) *infinite = 1;
#else
            put(line + slab * 8 + g, paired(first, second), Number<RESULT>());
#endif
          }
        }
      }
      continue;
    }
    // The cluster has one tile: nothing is on its way to shared memory any more.
    __syncthreads();
    float *const parts = (float *)shared; // [TOKENS, line]
    const int line = 16 * warps + 4;
#pragma unroll
    for (int i = 0; i < SUMS; i++)
      parts[(i / 4 * 8 + 2 * t + i % 2) * line + 16 * warp + g + i / 2 % 2 * 8] =
          sums[i] * scale[i / 2 % 2];
    asm volatile("barrier.cluster.arrive.release.aligned;\n"
                 "barrier.cluster.wait.acquire.aligned;" ::: "memory");
    const int tokens = min(TOKENS, T - first_token), rows = min(16 * slabs, N - 16 * first_slab);
    const int quads = KIND == 0 ? rows / 4 : rows / 8; // of results of a token
    for (int at = rank * blockDim.x + threadIdx.x; at < tokens * quads; at += blocks * blockDim.x) {
      const int token = at / quads, quad = at % quads;
      const int row = KIND == 0 ? 4 * quad : quad / 2 * 16 + quad % 2 * 4;
      float found[2][4] = {};
      const u32 here = shared_place + 4 * (token * line + row);
      for (int from = 0; from < blocks; from++) {
#pragma unroll
        for (int h = 0; h < 1 + (KIND == 1); h++) {
          u32 there;
          float x, y, z, w;
          asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here + 32 * h), "r"(from));
          asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                       : "=f"(x), "=f"(y), "=f"(z), "=f"(w) : "r"(there));
          found[h][0] += x, found[h][1] += y, found[h][2] += z, found[h][3] += w;
        }
      }
      Result *const place = (Result *)out + (i64)(first_token + token) * out_stride +
                            (KIND == 0 ? 16 : 8) * first_slab + 4 * quad;
#pragma unroll
      for (int c = 0; c < 4; c++) {
#if KIND == 0
        put(place + c, found[0][c], Number<RESULT>());
        const float most = __uint_as_float(0x7f800000);
        if (infinite != 0 && !(fabsf(found[0][c]) < most)) *infinite = 1;
#else
        put(place + c, paired(found[0][c], found[1][c]), Number<RESULT>());
#endif
      }
    }
    asm volatile("barrier.cluster.arrive.release.aligned;\n"
                 "barrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
}
