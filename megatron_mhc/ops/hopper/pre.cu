// pre, forward: coefficients and layer input from one read of the streams. See common.cuh for the scheme.
//
// Per tile, four kinds of warps, each a few tiles behind the one before:
//   load       x into shared memory, a ring of STAGES tiles
//   project    x . phi^T and the sum of squares of this slice on the tensor cores, phi as bf16 high + low
//              halves in registers for good; the sums go to global memory
//   finish     two warps a tile: wait for the group's sums and form h_pre, eight tokens each, for `aggregate`; one of
//              them saves the projection and writes the coefficients of this slice's share of tokens
//   aggregate  l = h_pre . x from shared memory, two tokens at a time
//
// parts [group, slot, slice, token, 36]: a ring of EXCHANGE tiles, 25 numbers as nine atoms: pre 4, squares, post
// 4, res 16. A block loads tile k when it is through with tile k - STAGES, for which it had the sums of the whole
// group; the others had loaded that one when they were through with k - 2 STAGES, whose slot tile k takes.
//
// With MIX, x are the streams in front of the connection before: its post_res makes of them those that are read.
//   project    first mixes, in place, x'_i = sum_j h_res[i, j] x_j + h_post_i (f + f_bias), each warp 32 channels, and has
//              x' copied out of shared memory
// f has a ring of its own, F_SLOTS deep, and the coefficients come with a tile.
//
// x, streams [T, 4, C], f, out [T, C], f_bias [C] bf16, before, mappings [T, 24] fp32, weight [24, 4 C] fp32, saved [T, 25]
// fp32 (projection / r, 1 / r), parts and ticket zeros; without MIX, f, streams, f_bias and before are not looked at.

#define PROJECTING 8
#define AGGREGATING 3
#define FINISHING 4        // in pairs
#define THREADS ((PROJECTING + AGGREGATING + FINISHING + 1) * 32)
#define TURNS 8            // that `aggregate` takes a tile in; every one of its warps has one of each tile
#define EACH (BT / TURNS)  // tokens of a turn
static_assert(BT == 16, "a tile is the left factor of a product, and eight tokens for each of a pair of warps");
#if MIX
static_assert(STAGES >= F_SLOTS, "too few stages");
#endif
#define STAGE (N * BOXES * BOX_BYTES)
#define STEPS_ALL (N * CW / 16)                                // of 16 columns
#define STEPS_EACH (STEPS_ALL / PROJECTING)  // per warp; CW is a multiple of 64
#define ATOMS 9                                                 // of three numbers that hold a token's 25
#define SUMS (BT * ATOMS * 3)
#define PART (BT * ATOMS * 4)
#define READ 2  // atoms that h_pre is made of, of all tokens behind each other; the rest of every token follows
#define AT(token, atom) (((atom) < READ ? (token) * READ + (atom) : BT * READ + (token) * (ATOMS - READ) + (atom) - READ) * 4)

// H_res of up to eight tokens, row lane % 4 of token t in lanes 4 k to 4 k + 3.
__device__ __forceinline__ void finish_held(const float* logits, int tokens, int t, int lane, float* mappings) {
  __syncwarp();
  if (tokens == 0) return;
  const float4 z = lane / 4 < tokens ? *(const float4*)(logits + lane * 4) : make_float4(0.f, 0.f, 0.f, 0.f);
  float h[N] = {z.x, z.y, z.z, z.w};
  sinkhorn_rows(h);
  if (lane / 4 < tokens) {
    float* to = mappings + (u64)t * M + 2 * N;
    const int i = lane % 4;
    if (V4)
#pragma unroll
      for (int j = 0; j < N; j++) to[j * N + i] = h[j];  // comb is H_res transposed
    else *(float4*)(to + i * N) = make_float4(h[0], h[1], h[2], h[3]);
  }
  __syncwarp();
}

#if MIX
// x' of four channels of a token, in place. h: its h_post, then H_res; here: where the channels lie in every region.
__device__ __forceinline__ void mix(unsigned char* tile, const unsigned char* f, const float* h, u32 here, uint2 added) {
  const uint2 fv = *(const uint2*)(f + here);
  const u32 f0 = pack(low_half(fv.x) + low_half(added.x), high_half(fv.x) + high_half(added.x));
  const u32 f1 = pack(low_half(fv.y) + low_half(added.y), high_half(fv.y) + high_half(added.y));
  uint2 v[N];
#pragma unroll
  for (int j = 0; j < N; j++) v[j] = *(const uint2*)(tile + j * (STAGE / N) + here);
  const float4 write = *(const float4*)h;
  const float writes[N] = {write.x, write.y, write.z, write.w};
#pragma unroll
  for (int i = 0; i < N; i++) {
    const float4 row = *(const float4*)(h + N + i * N);
    const float mixing[N] = {row.x, row.y, row.z, row.w};
    // The order of post_res.mixed, whose bits these are.
    float a0 = __fmul_rn(writes[i], low_half(f0)), a1 = __fmul_rn(writes[i], high_half(f0));
    float a2 = __fmul_rn(writes[i], low_half(f1)), a3 = __fmul_rn(writes[i], high_half(f1));
#pragma unroll
    for (int j = 0; j < N; j++) {
      a0 = __fmaf_rn(mixing[j], low_half(v[j].x), a0), a1 = __fmaf_rn(mixing[j], high_half(v[j].x), a1);
      a2 = __fmaf_rn(mixing[j], low_half(v[j].y), a2), a3 = __fmaf_rn(mixing[j], high_half(v[j].y), a3);
    }
    *(uint2*)(tile + i * (STAGE / N) + here) = make_uint2(pack(a0, a1), pack(a2, a3));
  }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1)
pre(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap f, const __grid_constant__ TensorMap streams,
    const bf16* __restrict__ f_bias, const float* __restrict__ before,
    const float* __restrict__ weight, const float* __restrict__ bias,
    const float* __restrict__ alpha_pre, const float* __restrict__ alpha_post,
    const float* __restrict__ alpha_res, bf16* __restrict__ out, float* __restrict__ saved,
    float* __restrict__ mappings, float* parts, u32* ticket, int T, int groups, float eps) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ __align__(8) u64 full[STAGES], known[STAGES], empty[STAGES];
#if MIX
  __shared__ __align__(8) u64 mixed[STAGES];
  unsigned char* outputs = memory + STAGES * STAGE;  // f
  float* sums = (float*)(outputs + F_SLOTS * (STAGE / N));
  float* coefficients = sums + 2 * PROJECTING * SUMS;  // [STAGES, BT, M]
  float* held = coefficients + STAGES * BT * M;
#else
  float* sums = (float*)(memory + STAGES * STAGE);  // [2, PROJECTING, SUMS]
  float* held = sums + 2 * PROJECTING * SUMS;       // [FINISHING, 8, 16], logits
#endif
  float* reads = held + FINISHING * 8 * 16;  // [STAGES, BT, N], h_pre
#if MIX
  bf16* bias_row = (bf16*)(reads + STAGES * BT * N);
  const u32 mixes = shared_address(mixed);
#endif
  const u32 tiles = shared_address(memory), fulls = shared_address(full), empties = shared_address(empty);
  const u32 knows = shared_address(known);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Place at = take_place(ticket, T, groups);
  parts += (u64)at.group * EXCHANGE * G * PART;

  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(fulls + 8 * s, 1);
      barrier_init(knows + 8 * s, 64);
      barrier_init(empties + 8 * s, TURNS * 32 + 2 + MIX);
#if MIX
      barrier_init(mixes + 8 * s, PROJECTING * 32);
#endif
    }
  }
#if MIX
  for (int c = threadIdx.x; c < CW; c += THREADS)
    bias_row[c] = f_bias && c < at.width ? f_bias[at.first_channel + c] : (bf16)0;
#endif
  fence_copies();
  __syncthreads();

  if (warp < PROJECTING) {
    set_registers<168>();
    u32 high[STEPS_EACH][3][2], low[STEPS_EACH][3][2];
    const int row = lane / 4, pair = lane % 4 * 2;
#pragma unroll
    for (int s = 0; s < STEPS_EACH; s++) {
      const int step = warp * STEPS_EACH + s, i = step / (CW / 16), c = step % (CW / 16) * 16;
#pragma unroll
      for (int n = 0; n < 3; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float2 w = make_float2(0.f, 0.f);
          if (c < at.width)
            w = *(const float2*)(weight + (u64)(n * 8 + row) * N * C + (u64)i * C + at.first_channel + c + pair + 8 * half);
          high[s][n][half] = pack(w.x, w.y);
          low[s][n][half] = pack_rest(w.x, w.y, high[s][n][half]);
        }
    }
    // Where this lane's row of the left factor lies. With all of a box a warp's, two chunks on are bits of it.
    u32 offset[STEPS_EACH % 4 ? STEPS_EACH : 1];
#pragma unroll
    for (int s = 0; s < (STEPS_EACH % 4 ? STEPS_EACH : 1); s++) {
      const int step = warp * STEPS_EACH + s;
      offset[s] = place(step / (CW / 16) * (STAGE / N) + lane % 16 * 128, step % (CW / 16) * 2 + lane / 16);
    }
#if MIX
    // This lane's four channels, and its first token; the others' rows lie 2, 8 and 10 below. A half warp's two rows are
    // four apart, which puts them into different banks.
    const int channel = warp * 32 + lane % 8 * 4, first = lane / 8 % 2 * 4 + lane / 16;
    const u32 own_x = place(first * 128, channel / 8) + channel % 8 * 2;
    const uint2 added = channel < CW ? *(const uint2*)(bias_row + channel) : make_uint2(0, 0);
#endif
    for (int it = 0; it < at.tiles; it++) {
      const int stage = it % STAGES;
      barrier_wait(fulls + 8 * stage, it / STAGES & 1);
      if (threadIdx.x == 0) MARK(it, 1);
#if MIX
      // Long since, or the copy would not have come; compute-sanitizer does not follow the copying thread's waits.
      if (it >= STAGES) barrier_wait(empties + 8 * stage, (it / STAGES - 1) & 1);
      if (warp * 32 < CW)
#pragma unroll 2
        for (int q = 0; q < 4; q++)
          mix(memory + stage * STAGE, outputs + it % F_SLOTS * (STAGE / N),
              coefficients + (stage * BT + first + q % 2 * 2 + q / 2 * 8) * M + N,
              (own_x ^ q % 2 * 32) + q % 2 * 256 + q / 2 * 1024, added);
      fence_copies();
      barrier_arrive(mixes + 8 * stage);
      sync_threads<PROJECTING * 32>(2);
      if (threadIdx.x == 0) {
        if (it > 0) {
          await_stored();  // long since
          barrier_arrive(empties + 8 * ((it - 1) % STAGES));
        }
        store_boxes<N>(streams, at.first_channel, 0, (at.group + it * groups) * BT, tiles + stage * STAGE);
      }
#endif
      float acc[3][4] = {}, rest[3][4] = {};  // with the high and the low halves of phi, in chains of their own
      float square0 = 0.f, square1 = 0.f;
#pragma unroll
      for (int s = 0; s < STEPS_EACH; s++) {
        u32 a[4];
        load_matrices(a, tiles + stage * STAGE + (STEPS_EACH % 4 ? offset[s] : (offset[0] ^ s % 4 * 32) + s / 4 * BOX_BYTES));
#pragma unroll
        for (int n = 0; n < 3; n++) {
          multiply16(rest[n], a[0], a[1], a[2], a[3], low[s][n][0], low[s][n][1]);
          multiply16(acc[n], a[0], a[1], a[2], a[3], high[s][n][0], high[s][n][1]);
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const float square = __fmaf_rn(low_half(a[k]), low_half(a[k]), high_half(a[k]) * high_half(a[k]));
          if (k % 2) square1 += square;
          else square0 += square;
        }
      }
      square0 = sum_axis<1>(square0);
      square1 = sum_axis<1>(square1);
      float* buffer = sums + (it & 1) * (PROJECTING * SUMS);
      float* own = buffer + warp * SUMS + row * (ATOMS * 3);  // in the order of atoms: squares behind pre
#pragma unroll
      for (int n = 0; n < 3; n++) {
        const int at_n = n * 8 + pair + (n > 0 || pair >= N);
        own[at_n] = acc[n][0] + rest[n][0];
        own[at_n + 1] = acc[n][1] + rest[n][1];
        own[8 * (ATOMS * 3) + at_n] = acc[n][2] + rest[n][2];
        own[8 * (ATOMS * 3) + at_n + 1] = acc[n][3] + rest[n][3];
      }
      if (pair == 0) own[N] = square0, own[8 * (ATOMS * 3) + N] = square1;
      sync_threads<PROJECTING * 32>(1);
      if (threadIdx.x < BT * ATOMS) {
        float total[3] = {};
#pragma unroll
        for (int w = 0; w < PROJECTING; w++)
#pragma unroll
          for (int k = 0; k < 3; k++) total[k] += buffer[w * SUMS + 3 * threadIdx.x + k];
        put(parts + ((it % EXCHANGE) * G + at.slice) * PART + AT(threadIdx.x / ATOMS, threadIdx.x % ATOMS),
            total[0], total[1], total[2], it + 1);
      }
      if (threadIdx.x == 0) MARK(it, 2);
    }
#if MIX
    if (threadIdx.x == 0) await_stored();
#endif
  } else {
    set_registers<88>();
  if (warp < PROJECTING + AGGREGATING) {
    for (int turn = warp - PROJECTING; turn < at.tiles * TURNS; turn += AGGREGATING) {
      const int it = turn / TURNS, first = turn % TURNS * EACH, stage = it % STAGES;
      barrier_wait(fulls + 8 * stage, it / STAGES & 1);
#if MIX
      barrier_wait(mixes + 8 * stage, it / STAGES & 1);
#endif
      barrier_wait(knows + 8 * stage, it / STAGES & 1);
      if (first == 0 && lane == 0) MARK(it, 8);
#pragma unroll
      for (int k = first; k < first + EACH; k++) {
        const float4 read = *(const float4*)(reads + (stage * BT + k) * N);
        const float h[N] = {read.x, read.y, read.z, read.w};
        const int t = (at.group + it * groups) * BT + k;
        // Only the store has a condition, so that tokens overlap.
#pragma unroll
        for (int c0 = 0; c0 < CW; c0 += 256) {
          const int c = min(c0 + lane * 8, CW - 8);
          float l[8] = {};
#pragma unroll
          for (int j = 0; j < N; j++) {
            const uint4 four = *(const uint4*)(memory + stage * STAGE + place(j * (STAGE / N) + k * 128, c / 8));
            const u32 v4[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int e = 0; e < 4; e++) {
              l[2 * e] = __fmaf_rn(h[j], low_half(v4[e]), l[2 * e]);
              l[2 * e + 1] = __fmaf_rn(h[j], high_half(v4[e]), l[2 * e + 1]);
            }
          }
          if (t < T && c0 + lane * 8 < at.width)
            *(uint4*)(out + (u64)t * C + at.first_channel + c) =
                make_uint4(pack(l[0], l[1]), pack(l[2], l[3]), pack(l[4], l[5]), pack(l[6], l[7]));
        }
      }
      if (first == BT - EACH && lane == 0) MARK(it, 5);
      barrier_arrive(empties + 8 * stage);  // every lane for what it has read itself
    }
  } else if (warp < PROJECTING + AGGREGATING + FINISHING) {
    // A token at a time; of eight the logits then go through Sinkhorn together, four lanes a token.
    float* logits = held + (warp - PROJECTING - AGGREGATING) * (8 * 16);
    const int m = lane < M ? lane : 0;
    const float gate = m < N ? *alpha_pre : m < 2 * N ? *alpha_post : *alpha_res, shift = bias[m];
    const float gate_pre = *alpha_pre, shift_pre = bias[lane % N];
    int tokens = 0, mine = 0;  // held, and the one of this lane
    const int half = warp - PROJECTING - AGGREGATING & 1, first = half * 8;
    for (int it = (warp - PROJECTING - AGGREGATING) / 2; it < at.tiles; it += FINISHING / 2) {
      const int stage = it % STAGES, tile = at.group + it * groups;
      const float* of_tile = parts + (it % EXCHANGE) * G * PART;
      if (half == 0 && lane == 0) MARK(it, 7);
      await_slices(of_tile + AT(first, 0), at.slice, PART, it + 1, lane);
      if (half == 0 && lane == 0) MARK(it, 3);
      {
        // Half the lanes sum up every second slice. Then lanes 2 t and 2 t + 1 have pre 0 to 2, and pre 3 and squares.
        const float3 some = sum_slices<2, LOADS>(of_tile + AT(first, 0) + lane % 16 * 4, lane / 16, PART, it + 1);
        const float3 read = add_lanes(some, lane % 16, lane % 16 + 16);
        const float inverse = rsqrtf(__fmaf_rn(__shfl_sync(ALL, read.y, 2 * (lane / N) + 1), 1.f / (N * C), eps));
        const float product = pick(read, 6 * (lane / N) + lane % N);
        reads[(stage * BT + first) * N + lane] =
            sigmoid(__fmaf_rn(__fmul_rn(product, inverse), gate_pre, shift_pre)) + (V4 ? EPS : 0.f);
      }
      barrier_arrive(knows + 8 * stage);
      if (half == 0 && lane == 0) MARK(it, 4);
      // Every second tile's are this warp's.
      int r = it / (FINISHING / 2) % 2 == half ? own_token(at, it) : BT;
      if (r >= BT && lane == 0) barrier_arrive(empties + 8 * stage);
      for (; r < BT; r += G) {
        const float3 some =
            sum_slices<2, LOADS>(of_tile + AT(r, min(lane % 16, ATOMS - 1)), lane / 16, PART, it + 1);
        const float3 total = add_lanes(some, lane % 16, lane % 16 + 16);
        if (r + G >= BT && lane == 0) MARK(it, 6);
        if (r + G >= BT && lane == 0) barrier_arrive(empties + 8 * stage);
        const float inverse = rsqrtf(__fmaf_rn(pick(total, N), 1.f / (N * C), eps));
        const float u = __fmul_rn(pick(total, m + (m >= N)), inverse), z = __fmaf_rn(u, gate, shift);
        const int t = tile * BT + r;
        if (t < T) {
          if (lane <= M) saved[(u64)t * 25 + lane] = lane < M ? u : inverse;
          if (lane < 2 * N) {
            const float s = sigmoid(z);
            mappings[(u64)t * M + lane] = lane < N ? s + (V4 ? EPS : 0.f) : 2.f * s;
          }
          if (lane >= 2 * N && lane < M) logits[tokens * 16 + lane - 2 * N] = z;
          if (lane / 4 == tokens) mine = t;
          if (++tokens == 8) finish_held(logits, 8, mine, lane, mappings), tokens = 0;
        }
      }
    }
    finish_held(logits, tokens, mine, lane, mappings);
  } else if (lane == 0) {  // another lane could come two phases late to a barrier, and wait forever
    const u64 policy = evict_first();
    for (int it = 0; it < at.tiles; it++) {
      const int stage = it % STAGES, token = (at.group + it * groups) * BT;
      const u32 bar = fulls + 8 * stage;
      if (it >= STAGES) barrier_wait(empties + 8 * stage, (it / STAGES - 1) & 1);
#if MIX
      const int past = it - F_SLOTS;
      if (past >= 0) barrier_wait(mixes + 8 * (past % STAGES), past / STAGES & 1);
      const u32 bytes = min(BT, T - token) * (M * 4);
#else
      const u32 bytes = 0;
#endif
      MARK(it, 0);
      barrier_expect(bar, STAGE + MIX * (STAGE / N) + bytes);
      load_boxes<N>(tiles + stage * STAGE, x, at.first_channel, 0, token, bar, policy);
#if MIX
      load_boxes<1>(shared_address(outputs) + it % F_SLOTS * (STAGE / N), f, at.first_channel, 0, token, bar, policy);
      load_bytes(shared_address(coefficients + stage * BT * M), before + (u64)token * M, bytes, bar);
#endif
    }
  }
  }
}
