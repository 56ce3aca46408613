// Linears of up to 16 tokens by INT8 weights: the weights stream from memory through shared memory
// into the integer tensor cores, and are converted to nothing.
//
// Activations are 16-bit fixed point for each token and group of 128, x = step * (256 high + low),
// in two planes of int8 (or one plane: `--activations int8`). High and low are columns of one
// product, mma m16n8k32, and its int32 sums over a group are exact: a group's float is
// (256 high + low) * scale * step. Weights stay row-major: within 64 columns a lane takes 16 bytes
// in a row, and activations are taken in the same order, which is as good as any for a sum.
//
// A block has 16 ROW_TILES rows at a time and its warps share K by steps of 128 columns, OWN each
// at most. A warp has DEPTH of its steps on their way to shared memory, over the ends of row tiles,
// and the first of them before `griddepcontrol.wait`: while the kernel before still runs. A lane
// brings the very bytes that it multiplies, and everything about a step but the row is known when
// this is compiled: a step is some fifty instructions, as many as leave memory the limit.
//
// Compiled by NVRTC (`nvrtc.py`) with these macros, by `stream.py`:
//   COLUMNS (K), WARPS, DEPTH (divides OWN), ROW_TILES, TOKEN_TILES, PLANES, PDL
//   BLOCKS: of a multiprocessor, at least
//   HELD: where activations wait. 0: in memory, and are read a step ahead; 1: in shared memory;
//         2: in registers
//   GIVEN 0: planes; 1: one token in bfloat16, 2: in float16, whose planes are made here
//   KIND 0: out = product; 1: out = silu(gate) * up, the two halves of the rows;
//        2: queries, keys and values, rotated by position and put where they belong, heads of
//           2 HALF channels
//   RESULT, KEPT 0: float32, 1: bfloat16, 2: float16: the dtypes of `out` and of the cache

typedef unsigned int u32;
typedef unsigned short u16;
typedef signed char i8;
typedef long long i64;

#define TOKENS (TOKEN_TILES * 8 / PLANES) // a product has 8 columns
#define ROWS (16 * ROW_TILES)
#define THREADS (32 * WARPS)
#define STEPS ((COLUMNS + 127) / 128)
#define OWN ((STEPS + WARPS - 1) / WARPS)
#define SLOT (ROW_TILES * (16 * 128 + 16 * 4)) // bytes of a step: weights and their scales

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
typedef Stored<KEPT>::type Kept;

// Weights: read once, by nobody else, never written.
__device__ __forceinline__ void bring_weights(u32 to, const i8 *from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from));
}

__device__ __forceinline__ void bring_zeros(u32 to, const i8 *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, 0;" ::"r"(to), "l"(from));
}

__device__ __forceinline__ void bring_scale(u32 to, const float *from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from));
}

// sums [16 rows, 8 columns] += a [16, 32] b [32, 8]
__device__ __forceinline__ void multiply(int (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                         u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float widened(u32 half_word) {
#if GIVEN == 1
  return __uint_as_float(half_word << 16);
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)half_word));
  return value;
#endif
}

// The matrix row of row r of 16 of a tile; rows 8 to 15 are partners of 0 to 7 where KIND needs it.
__device__ __forceinline__ int row_of(int tile, int r, int N) {
  tile = min(tile, N / 16 - 1);
#if KIND == 1
  return tile * 8 + r % 8 + r / 8 * (N / 2);
#elif KIND == 2
  const int pair = tile * 8 + r % 8;
  return pair / HALF * (2 * HALF) + pair % HALF + r / 8 * HALF;
#else
  return tile * 16 + r;
#endif
}

// Where a lane finds its part of a row tile: 16 columns from lane % 4 * 16 on of rows lane / 4 and
// lane / 4 + 8, and the scale of row lane % 16.
struct Tile {
  const i8 *values[ROW_TILES][2];
  const float *scales[ROW_TILES];
};

// Activations of a step, [column lane / 4 of a product], and the steps of the tokens whose sums
// the lane will hold.
struct Activations {
  uint4 values[TOKEN_TILES][2];
  float steps[TOKEN_TILES][3 - PLANES];
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
stream(const void *given,         // [PLANES, T, K] int8; or [1, K] bfloat16 or float16
       const float *given_steps,  // [K / 128, steps_stride] of planes
       const i8 *weight,          // [N, K], N a multiple of 16
       const float *scales,       // [N, ceil(K / 128)]
       void *out,                 // [T, out_stride]: N, or N / 2 of a pair, or [T, heads, 2 HALF]
       int *infinite,             // [1], set where a product is NaN or infinite; or null
       int T, int N, int tiles, int steps_stride, int out_stride,
       const float *bias,         // [N] or null
       const float *cosines, const float *sines, // [max_model_len, HALF]
       const i64 *positions, const i64 *slots,   // [T]
       void *kept,                // [2, blocks, kv_heads, block_tokens, 2 HALF]
       int heads, int kv_heads, int blocks, int block_tokens) {
#if PDL
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  __shared__ float shared_sums[2][WARPS][TOKENS][ROWS];
  extern __shared__ uint4 shared[]; // [WARPS, DEPTH] slots; then activations
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  char *const ring = (char *)shared + warp * DEPTH * SLOT;
  const u32 lane_place = (u32)__cvta_generic_to_shared(ring) + 16 * lane;
  const u32 scale_place = (u32)__cvta_generic_to_shared(ring) + ROW_TILES * 2048 + 4 * lane;

  auto find = [&](int tile) {
    Tile found;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
      found.scales[m] = scales + (i64)row_of(tile * ROW_TILES + m, lane % 16, N) * STEPS + warp;
#pragma unroll
      for (int h = 0; h < 2; h++)
        found.values[m][h] =
            weight + (i64)row_of(tile * ROW_TILES + m, g + 8 * h,
                N) * COLUMNS + 128 * warp + 16 * t;
    }
    return found;
  };
  // Whether the warp has an index-th step: they are its own number and every WARPS-th after it.
  auto has =
      [&](int index) { return index * WARPS + WARPS <= STEPS || warp + index * WARPS < STEPS; };
  auto bring = [&](const Tile &tile, int index) {
    if (has(index)) {
      const int place = index % DEPTH * SLOT;
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const i8 *from = tile.values[m][h] + index * WARPS * 128;
          const u32 to = lane_place + place + (m * 2 + h) * 1024;
          bring_weights(to, from);
          if (COLUMNS % 128 != 0 && warp + index * WARPS == STEPS - 1) // K ends within the step
            bring_zeros(to + 512, from);
          else
            bring_weights(to + 512, from + 64);
        }
        if (lane < 16) bring_scale(scale_place + place + 64 * m, tile.scales[m] + index * WARPS);
      }
    }
  };
  auto commit = [&]() { asm volatile("cp.async.commit_group;" ::: "memory"); };

  const int stride = gridDim.x; // blocks read side by side
  Tile now = find(blockIdx.x);
#pragma unroll
  for (int d = 0; d < DEPTH; d++) {
    bring(now, d);
    commit();
  }
#if PDL
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif

#if HELD == 1 || GIVEN
  // Activations of the warp's own columns in shared memory: nobody else needs them. A line of a
  // step is 8 times 16 bytes, whose halves change places in every other line: banks differ.
  const int lines = T * PLANES;
  uint4 *const staged = shared + WARPS * DEPTH * SLOT / 16; // [STEPS, lines, 8]
  float *const staged_steps = (float *)(staged + STEPS * lines * 8); // [STEPS, T]
#endif
#if GIVEN
#pragma unroll 4
  for (int index = 0; index < OWN; index++) {
    const int step = warp + index * WARPS, column = step * 128 + 4 * lane;
    uint2 words = make_uint2(0, 0);
    if (column < COLUMNS) words = *(const uint2 *)((const u16 *)given + column);
    const float x[4] = {widened(words.x & 0xffff), widened(words.x >> 16),
                        widened(words.y & 0xffff), widened(words.y >> 16)};
    u32 top = 0, v[4];
#pragma unroll
    for (int c = 0; c < 4; c++) top = max(top, __float_as_uint(x[c]) & 0x7fffffff);
    top = __reduce_max_sync(0xffffffff, top); // NaN is above infinity, and both are kept
    const float largest = __uint_as_float(top);
    const bool finite = top < 0x7f800000, none = finite && largest < 1e-30f;
    const float inverse = none ? 1.f : finite ? __fdiv_rn(32512.f, largest) : 0.f;
#pragma unroll
    for (int c = 0; c < 4; c++) // 1.5 * 2**23: the last 16 bits are the rounded number
      v[c] = __float_as_uint(__fmaf_rn(x[c], inverse, 12582912.f));
    const u32 low =
        __byte_perm(__byte_perm(v[0], v[1], 0x40), __byte_perm(v[2], v[3], 0x40), 0x5410);
#pragma unroll
    for (int c = 0; c < 4; c++) v[c] += 128;
    const u32 high =
        __byte_perm(__byte_perm(v[0], v[1], 0x51), __byte_perm(v[2], v[3], 0x51), 0x5410);
    if (has(index)) {
      u32 *place = (u32 *)(staged + step * 16);
      place[lane] = high;
      place[32 + (lane ^ 16)] = low;
      if (lane == 0)
        staged_steps[step] =
            none ? 1.f : finite ? __fdiv_rn(largest, 32512.f) : __uint_as_float(0x7fffffff);
    }
  }
#elif HELD == 1
#pragma unroll 2
  for (int index = 0; index < OWN; index++) {
    const int step = warp + index * WARPS;
    if (!has(index)) break;
    for (int i = lane; i < lines * 8; i += 32) {
      const int line = i / 8, column = step * 128 + i % 8 * 16;
      const i8 *place =
          (const i8 *)given + ((i64)(line % PLANES) * T + line / PLANES) * COLUMNS + column;
      staged[(step * lines + line) * 8 + (i % 8 ^ line % 2 * 4)] =
          column < COLUMNS ? *(const uint4 *)place : make_uint4(0, 0, 0, 0);
    }
    if (lane < T) staged_steps[step * T + lane] = given_steps[(i64)step * steps_stride + lane];
  }
#endif
  __syncwarp();

  auto activations = [&](int index) {
    const int step = warp + index * WARPS;
    Activations found;
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++) {
      const int line = 8 * n + g, token = (8 * n + 2 * t) / PLANES;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        found.values[n][j] = make_uint4(0, 0, 0, 0);
#if HELD == 1 || GIVEN
        if (line < lines) found.values[n][j] =
            staged[(step * lines + line) * 8 + ((4 * j + t) ^ line % 2 * 4)];
#else
        const int column = step * 128 + 64 * j + 16 * t;
        if (line / PLANES < T && column < COLUMNS)
          found.values[n][j] = *(const uint4 *)((const i8 *)given +
                                                ((i64)(g % PLANES) * T +
                                                    line / PLANES) * COLUMNS + column);
#endif
      }
#pragma unroll
      for (int c = 0; c < 3 - PLANES; c++) {
        found.steps[n][c] = 0;
#if HELD == 1 || GIVEN
        if (token + c < T) found.steps[n][c] = staged_steps[step * T + token + c];
#else
        if (token + c < T) found.steps[n][c] = given_steps[(i64)step * steps_stride + token + c];
#endif
      }
    }
    return found;
  };

  float sums[ROW_TILES][TOKEN_TILES][2][3 - PLANES] = {};
  auto multiply_step = [&](int index, const Activations &x) {
    const uint4 *const values = (const uint4 *)(ring + index % DEPTH * SLOT) + lane;
    const float *const their_scales =
        (const float *)(ring + index % DEPTH * SLOT + ROW_TILES * 2048) + g;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
      const uint4 *const mine = values + m * 4 * 32;
      const uint4 a[2] = {mine[0], mine[32]}, b[2] = {mine[64], mine[96]};
      const float scale[2] = {their_scales[16 * m], their_scales[16 * m + 8]};
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; n++) {
        int found[4] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const uint4 c = x.values[n][j];
          multiply(found, a[j].x, b[j].x, a[j].y, b[j].y, c.x, c.y);
          multiply(found, a[j].z, b[j].z, a[j].w, b[j].w, c.z, c.w);
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
#if PLANES == 2
          const int exact = found[2 * h] * 256 + found[2 * h + 1];
          sums[m][n][h][0] += (float)exact * (scale[h] * x.steps[n][0]);
#else
#pragma unroll
          for (int c = 0; c < 2; c++)
            sums[m][n][h][c] += (float)found[2 * h + c] * (scale[h] * x.steps[n][c]);
#endif
        }
      }
    }
  };

  int buffer = 0, turn = 0;
  // Add up what the warps have, in their order, and put it where it belongs.
  auto finish = [&](int tile) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; n++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int c = 0; c < 3 - PLANES; c++) {
            shared_sums[buffer][warp][(8 * n + 2 * t) / PLANES + c][16 * m + 8 * h + g] =
                sums[m][n][h][c];
            sums[m][n][h][c] = 0;
          }
    __syncthreads();
    const int each = KIND == 0 ? ROWS : ROWS / 2;
    // Another warp begins each time: the others are ahead of it meanwhile.
#pragma unroll 1
    for (int index = (threadIdx.x + 32 * turn) % THREADS; index < T * each; index += THREADS) {
      const int token = index / each, r = index % each;
      const int local = KIND == 0 ? r : r / 8 * 16 + r % 8;
      float first = 0, second = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        first += shared_sums[buffer][w][token][local];
        if (KIND != 0) second += shared_sums[buffer][w][token][local + 8];
      }
      const i64 line = (i64)token * out_stride;
#if KIND == 0
      const int row = tile * ROWS + r;
      if (row < N) {
        put((Result *)out + line + row, first, Number<RESULT>());
        if (infinite != 0 && !(fabsf(first) < __uint_as_float(0x7f800000))) *infinite = 1;
      }
#elif KIND == 1
      const int channel = tile * (ROWS / 2) + r;
      if (channel < N / 2)
        put((Result *)out + line + channel, first / (1 + __expf(-first)) * second,
            Number<RESULT>());
#else
      const int pair = tile * (ROWS / 2) + r, head = pair / HALF, channel = pair % HALF;
      if (head < heads + 2 * kv_heads) {
        if (bias != 0) {
          first += bias[head * 2 * HALF + channel];
          second += bias[head * 2 * HALF + channel + HALF];
        }
        if (head < heads + kv_heads) {
          const i64 angle = positions[token] * HALF + channel;
          const float cosine = cosines[angle], sine = sines[angle], before = first;
          first = before * cosine - second * sine;
          second = second * cosine + before * sine;
        }
        const i64 slot = slots[token];
        if (head < heads) {
          Result *place = (Result *)out + line + head * 2 * HALF + channel;
          put(place, first, Number<RESULT>());
          put(place + HALF, second, Number<RESULT>());
        } else if (slot >= 0) {
          const int kv_head = head - heads;
          const i64 block = (i64)(kv_head / kv_heads) * blocks + slot / block_tokens;
          const i64 vector =
              (block * kv_heads + kv_head % kv_heads) * block_tokens + slot % block_tokens;
          Kept *place = (Kept *)kept + vector * (2 * HALF) + channel;
          put(place, first, Number<KEPT>());
          put(place + HALF, second, Number<KEPT>());
        }
      }
#endif
    }
    turn = turn + 1 == WARPS ? 0 : turn + 1;
    buffer ^= 1; // who writes the other one has passed the barrier after its last reader
  };

#if HELD == 2
  Activations held[OWN];
#pragma unroll
  for (int index = 0; index < OWN; index++)
    if (has(index)) held[index] = activations(index);
#elif HELD == 0
  Activations coming;
  if (has(0)) coming = activations(0);
#endif
  for (int tile = blockIdx.x; tile < tiles; tile += stride) {
    const bool more = tile + stride < tiles;
    const Tile next = find(tile + stride);
#pragma unroll
    for (int index = 0; index < OWN; index++) {
#if HELD == 0
      const Activations x = coming;
      if (has((index + 1) % OWN)) coming = activations((index + 1) % OWN);
#elif HELD == 1
      Activations x;
      if (has(index)) x = activations(index);
#else
      const Activations &x = held[index];
#endif
      asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
      __syncwarp(); // scales come by other lanes
      if (has(index)) multiply_step(index, x);
      __syncwarp(); // all have read: the slot may be written
      if (index + DEPTH < OWN)
        bring(now, index + DEPTH);
      else if (more)
        bring(next, index + DEPTH - OWN);
      commit(); // an empty group past the end: those before count the same
    }
    finish(tile);
    now = next;
  }
}
