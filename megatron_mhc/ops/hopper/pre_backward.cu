// pre, backward: every gradient from one read of x, g, f and dl. See common.cuh for the scheme.
//
// Per tile, six kinds of warps, each a few tiles behind the one before:
//   load    g, dl and x into shared memory, a ring of STAGES tiles, and f, which `dots` alone reads, a ring of F_SLOTS
//   dots    the 24 products over C that the coefficients' gradients are made of, on the tensor cores: for each
//           token [g_0..g_3, dl] (x_0..x_3, f, f_bias)^T but for dl's with f; the slice's share goes to global memory
//   middle  for this slice's share of tokens, up to two at a time: replays Sinkhorn there and back, which the sums are not needed for, waits
//           for the group's sums, forms the gradient d of the raw projection, and publishes that and the coefficients (middle.cuh)
//   fetch   waits for those of the whole tile and lays them out in shared memory, FETCHED tiles deep
//   dx      dx_j = sum_i h_res[i, j] g_i + h_pre_j dl + (d . phi)_j + s x_j, in place of g_j; with
//           DF, in place of dl, the df of the connection that wrote x; phi's gradient stays in registers
//   store   copies those out
//
// parts [group, slot, slice, token, 8 atoms] and coefficients [group, slot, token, 17 atoms] are rings of EXCHANGE
// tiles. A block loads tile j when it is through with tile j - STAGES, whose coefficients exist: so all
// sums of that tile have been read; and coefficients are made when the whole group has loaded a tile.
//
// At the end groups add their share of phi's gradient in turn, and the last block to finish sums up the
// biases' and alphas' gradients: the same bits in every run.
//
// x, g, dx [T, 4, C] bf16, f, dl, df [T, C] bf16, weight, d_weight [24, 4 C] fp32, saved [T, 25] fp32,
// partial [MIDDLE blocks, 48] fp32; parts, coefficients and counts [2 + 8 G] zeros.

#define DX 8
#define DOTS 2
#define THREADS ((DX + DOTS + 3 + MIDDLE) * 32)
static_assert(BT == 8, "a tile is half the left factor of a product, and four tokens for each warp of `dots`");
#define G_AT 0   // later dx
#define DL_AT 4  // later df
#define X_AT 5
// A tile's tokens of one tensor: in pairs, with 128 bytes between them to keep the rows of the first five, and those of the last
// four, off each other's banks.
#define REGION (BOXES * BOX_BYTES)
#define REGION_AT(k) ((k) % 5 * (2 * REGION + 128) + (k) / 5 * REGION)
#define STAGE (9 * REGION + 512)
#define ODD(stage) (stage % 2 * 64)  // 512 bytes on, eight rows' chunks are exchanged four further: what `place` gives, with this bit changed
static_assert(REGION % 1024 == 0, "every second stage begins half way between two multiples of 1024");
#define FETCHED 4
#define LOADED ((BT * COEFFICIENT_ATOMS + 31) / 32)  // by a lane of `fetch`
#define SLOT (BT * ROW * 4)                          // bytes
#define BIAS_ROW ((BOXES - 1) * BOX_BYTES + 128)

__device__ __forceinline__ u32 load_pair(const unsigned char* p) { return *(const u32*)p; }

extern "C" __global__ void __launch_bounds__(THREADS, 1)
pre_backward(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap g,
             const __grid_constant__ TensorMap f, const __grid_constant__ TensorMap dl,
             const __grid_constant__ TensorMap dx, const __grid_constant__ TensorMap df,
             const bf16* __restrict__ f_bias, const float* __restrict__ weight,
             const float* __restrict__ bias, const float* __restrict__ alpha_pre,
             const float* __restrict__ alpha_post, const float* __restrict__ alpha_res,
             const float* __restrict__ saved, const float* __restrict__ writer_saved,
             const float* __restrict__ writer_bias, const float* __restrict__ writer_alpha,
             float* d_weight, float* d_bias, float* d_alphas,
             float* parts, float* coefficients, float* partial, u32* counts, int T, int groups) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ __align__(8) u64 full[STAGES], finished[STAGES], empty[STAGES], fetched[FETCHED], used[FETCHED], dotted[F_SLOTS];
  unsigned char* tiles = memory + F_SLOTS * REGION;  // behind f
  unsigned char* slots = tiles + STAGES * STAGE;
  unsigned char* bias_row = slots + FETCHED * SLOT;  // f_bias of this slice, as far apart as a row of other boxes
  float* staging = (float*)(bias_row + BIAS_ROW);    // of the middle warps
  const u32 base = shared_address(tiles), outputs = shared_address(memory), fulls = shared_address(full), finishes = shared_address(finished);
  const u32 fetches = shared_address(fetched), uses = shared_address(used), empties = shared_address(empty), dots = shared_address(dotted);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Place at = take_place(counts, T, groups);
  u32 *done = counts + 1, *turns = counts + 2;
  parts += (u64)at.group * EXCHANGE * G * PART;
  coefficients += (u64)at.group * EXCHANGE * (BT * COEFFICIENT_ATOMS * 4);

  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++)
      barrier_init(fulls + 8 * s, 1), barrier_init(finishes + 8 * s, DX), barrier_init(empties + 8 * s, 1);
    for (int s = 0; s < FETCHED; s++) barrier_init(fetches + 8 * s, 32), barrier_init(uses + 8 * s, DX);
    for (int s = 0; s < F_SLOTS; s++) barrier_init(dots + 8 * s, DOTS);
  }
  for (int c = threadIdx.x; c < CW; c += THREADS)
    ((bf16*)(bias_row + c / BOX * BOX_BYTES))[c % BOX] = f_bias && c < at.width ? f_bias[at.first_channel + c] : (bf16)0;
  fence_copies();
  __syncthreads();

  if (warp < DX) {
    set_registers<152>();
    const int own = warp * 16, row = lane / 4, pair = lane % 4 * 2;
    const bool active = own < at.width;
    u32 phi[N][2][3];  // [stream, 8 channels, rows 2 k of 16, 16, 8]
    float d_phi[N][3][4] = {};
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int k = 0; k < 3; k++) {
          const float* w = weight + (u64)(k * 8 + pair) * N * C + (u64)j * C + at.first_channel + own + n * 8 + row;
          phi[j][n][k] = active ? pack(w[0], w[(u64)N * C]) : 0;
        }
    u32 transposed[N / 2], pairs[9];  // where this lane's part of x lies for dphi, two streams a load, and of g, dl and x for dx
#pragma unroll
    for (int j = 0; j < N / 2; j++)
      transposed[j] = place(REGION_AT(X_AT + 2 * j + lane / 16) + lane % 8 * 128, own / 8 + lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < 9; k++) pairs[k] = place(REGION_AT(k) + row * 128, own / 8) + pair * 2;
    for (int it = 0; it < at.tiles; it++) {
      const int stage = it % STAGES, slot = it % FETCHED;
      const u32 odd = ODD(stage);
      unsigned char* tile = tiles + stage * STAGE;
      barrier_wait(fulls + 8 * stage, it / STAGES & 1);
      barrier_wait(fetches + 8 * slot, it / FETCHED & 1);
      if (threadIdx.x == 0) MARK(it, 8);
      if (active) {
        const float* coefficient = (const float*)(slots + slot * SLOT);
        {
          u32 d_high[3], d_low[3];  // [rows of phi, tokens], two tokens a register
#pragma unroll
          for (int n = 0; n < 3; n++) {
            const float* d = coefficient + pair * ROW + D + n * 8 + row;
            d_high[n] = pack(d[0], d[ROW]);
            d_low[n] = pack_rest(d[0], d[ROW], d_high[n]);
          }
#pragma unroll
          for (int j = 0; j < N; j += 2) {
            u32 a[4];
            load_transposed(a, base + stage * STAGE + (transposed[j / 2] ^ odd));
#pragma unroll
            for (int n = 0; n < 3; n++)
#pragma unroll
              for (int k = 0; k < 2; k++) {
                multiply8(d_phi[j + k][n], a[2 * k], a[2 * k + 1], d_low[n]);
                multiply8(d_phi[j + k][n], a[2 * k], a[2 * k + 1], d_high[n]);
              }
          }
        }
        const float* h = coefficient + row * ROW;
        u32 high[3], low[3];  // [tokens, rows of phi], two rows a register: rows 0 to 7 and 8 to 15 of a left factor
#pragma unroll
        for (int k = 0; k < 3; k++) {
          const float2 d = *(const float2*)(h + D + k * 8 + pair);
          high[k] = pack(d.x, d.y);
          low[k] = pack_rest(d.x, d.y, high[k]);
        }
#pragma unroll
        for (int n = 0; n < 2; n++) {
          float acc[N][4] = {};
#pragma unroll
          for (int j = 0; j < N; j++) {
            multiply16(acc[j], high[0], low[0], high[1], low[1], phi[j][n][0], phi[j][n][1]);
            multiply8(acc[j], high[2], low[2], phi[j][n][2]);
          }
#define HERE(region) (tile + (pairs[region] ^ n * 16 ^ odd))  // eight channels on: the other half of 32 bytes
          const u32 dlv = load_pair(HERE(DL_AT));
          const float4 read = *(const float4*)(h + H_PRE);
          const float from_norm = h[NORM];
          const float reads[N] = {read.x, read.y, read.z, read.w};
          float v[N][2];
#pragma unroll
          for (int j = 0; j < N; j++) {
            const u32 xv = load_pair(HERE(X_AT + j));
            v[j][0] = __fmaf_rn(from_norm, low_half(xv), __fmaf_rn(reads[j], low_half(dlv), acc[j][0] + acc[j][2]));
            v[j][1] = __fmaf_rn(from_norm, high_half(xv), __fmaf_rn(reads[j], high_half(dlv), acc[j][1] + acc[j][3]));
          }
#pragma unroll
          for (int i = 0; i < N; i++) {
            const u32 gv = load_pair(HERE(G_AT + i));
            const float4 mix = *(const float4*)(h + H_RES + 4 * i);
            const float mixes[N] = {mix.x, mix.y, mix.z, mix.w};
#pragma unroll
            for (int j = 0; j < N; j++) {
              v[j][0] = __fmaf_rn(mixes[j], low_half(gv), v[j][0]);
              v[j][1] = __fmaf_rn(mixes[j], high_half(gv), v[j][1]);
            }
          }
#if DF
          const float4 write = *(const float4*)(h + WRITER);
          const float writes[N] = {write.x, write.y, write.z, write.w};
          float sum0 = 0.f, sum1 = 0.f;
#endif
#pragma unroll
          for (int j = 0; j < N; j++) {
            const u32 rounded = pack(v[j][0], v[j][1]);
            *(u32*)HERE(G_AT + j) = rounded;
#if DF
            sum0 = __fmaf_rn(writes[j], low_half(rounded), sum0);
            sum1 = __fmaf_rn(writes[j], high_half(rounded), sum1);
#endif
          }
#if DF
          *(u32*)HERE(DL_AT) = pack(sum0, sum1);
#endif
        }
      }
      fence_copies(), __syncwarp();
      if (threadIdx.x == 0) MARK(it, 9);
      if (lane == 0) barrier_arrive(finishes + 8 * stage), barrier_arrive(uses + 8 * slot);
    }
    u32* turn = turns + at.slice * DX + warp;
    await(turn, at.group, lane);
    if (active) {
      float* to = d_weight + (u64)pair * N * C + at.first_channel + own + row;
#define THERE(j, n, k) to[(u64)(n * 8 + k % 2) * N * C + (u64)j * C + k / 2 * 8]
      float before[N][3][4] = {};
      if (at.group)  // all at once: each takes as long as all
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
          for (int n = 0; n < 3; n++)
#pragma unroll
            for (int k = 0; k < 4; k++) before[j][n][k] = load_fresh(&THERE(j, n, k));
#pragma unroll
      for (int j = 0; j < N; j++)
#pragma unroll
        for (int n = 0; n < 3; n++)
#pragma unroll
          for (int k = 0; k < 4; k++) THERE(j, n, k) = d_phi[j][n][k] + before[j][n][k];
    }
    publish(turn, lane);
  } else if (warp < DX + DOTS + 2) {
    set_registers<80>();
  if (warp < DX + DOTS) {
    // Two tokens' g and dl, rows 0 to 7 and 8 to 15, are the left factor of two products, with the x, f and f_bias of either.
    const int r = lane % 8, row = lane / 4, pair = lane % 4 * 2, first = (warp - DX) * 4;
    const int left_half = lane / 16, right_half = lane / 8 % 2;  // of 16 channels, that this lane's row is of
    const int left_at = REGION_AT(G_AT + min(r, 4)) + (first + lane / 8 % 2) * 128;
    const int right_at = r < 4 ? REGION_AT(X_AT + r) : 0, right_token = first + lane / 16;
    for (int it = 0; it < at.tiles; it++) {
      const int stage = it % STAGES;
      float* part = parts + ((it % EXCHANGE) * G + at.slice) * PART;
      const u32 tile = base + stage * STAGE, output = outputs + it % F_SLOTS * REGION;
      u32 left[2], right[2];  // where the rows of two pairs begin
#pragma unroll
      for (int k = 0; k < 2; k++) {
        left[k] = tile + (place(left_at + k * 256, left_half) ^ ODD(stage));
        right[k] = r < 4   ? tile + (place(right_at + (right_token + 2 * k) * 128, right_half) ^ ODD(stage))
                   : r < 5 ? output + place((right_token + 2 * k) * 128, right_half)
                           : shared_address(bias_row) + right_half * 16;
      }
      barrier_wait(fulls + 8 * stage, it / STAGES & 1);
      if (warp == DX && lane == 0) MARK(it, 1);
      float acc[2][2][4] = {};  // [pair, token of it], whose sums wait for nothing of each other
#pragma unroll
      for (int s = 0; s < CW / 16; s++)  // 16 channels on: two chunks, which exchanging leaves two bits apart
#pragma unroll
        for (int k = 0; k < 2; k++) {
          u32 a[4], b[4];
          load_matrices(a, (left[k] ^ s % 4 * 32) + s / 4 * BOX_BYTES);
          load_matrices(b, (right[k] ^ s % 4 * 32) + s / 4 * BOX_BYTES);
          multiply16(acc[k][0], a[0], a[1], a[2], a[3], b[0], b[1]);
          multiply16(acc[k][1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const float v0 = acc[k / 2][k % 2][k % 2 * 2], v1 = acc[k / 2][k % 2][k % 2 * 2 + 1];
        const float next = __shfl_sync(ALL, pair == 4 ? v0 + v1 : v0, lane + 1);
        const float even = __shfl_sync(ALL, v0, 16 + row / 2), odd = __shfl_sync(ALL, v1, 16 + row / 2);
        float* atom = part + ((first + k) * ATOMS + row * 2 + pair / 2) * 4;
        if (row < N && pair == 0) put(atom, v0, v1, next, it + 1);
        if (row < N && pair == 2) put(atom, v1, next, row % 2 ? odd : even, it + 1);
      }
      if (lane == 0) barrier_arrive(dots + 8 * (it % F_SLOTS));
      if (warp == DX && lane == 0) MARK(it, 2);
    }
  } else if (warp == DX + DOTS) {
    for (int it = 0; it < at.tiles; it++) {
      const int slot = it % FETCHED;
      Tagged v[LOADED];
      int offset[LOADED];
#pragma unroll
      for (int k = 0; k < LOADED; k++) offset[k] = min(k * 32 + lane, BT * COEFFICIENT_ATOMS - 1) * 4;
      get_all(v, coefficients + (it % EXCHANGE) * (BT * COEFFICIENT_ATOMS * 4), offset, it + 1);
      if (lane == 0) MARK(it, 6);
      if (it >= FETCHED) barrier_wait(uses + 8 * slot, (it / FETCHED - 1) & 1);
      float* to = (float*)(slots + slot * SLOT);
#pragma unroll
      for (int k = 0; k < LOADED; k++)
        if (k * 32 + lane < BT * COEFFICIENT_ATOMS) {
          const int token = (k * 32 + lane) / COEFFICIENT_ATOMS, first = (k * 32 + lane) % COEFFICIENT_ATOMS * 3;
          to[token * ROW + first] = v[k].x, to[token * ROW + first + 1] = v[k].y, to[token * ROW + first + 2] = v[k].z;
        }
      __syncwarp();
      if (lane == 0) MARK(it, 7);
      barrier_arrive(fetches + 8 * slot);
    }
  } else if (lane == 0) {  // another lane could come two phases late to a barrier, and wait forever
    const u64 policy = evict_first();
    for (int it = 0; it < at.tiles; it++) {
      const int stage = it % STAGES, token = (at.group + it * groups) * BT;
      const u32 tile = base + stage * STAGE, bar = fulls + 8 * stage;
      if (it >= STAGES) barrier_wait(empties + 8 * stage, (it / STAGES - 1) & 1);
      MARK(it, 0);
      barrier_expect(bar, 10 * REGION);
#pragma unroll
      for (int j = 0; j < N; j++) {
        load_boxes<1>(tile + REGION_AT(G_AT + j), g, at.first_channel, j, token, bar, policy);
        load_boxes<1>(tile + REGION_AT(X_AT + j), x, at.first_channel, j, token, bar, policy);
      }
      load_boxes<1>(tile + REGION_AT(DL_AT), dl, at.first_channel, 0, token, bar, policy);
      if (it >= F_SLOTS) barrier_wait(dots + 8 * (it % F_SLOTS), (it / F_SLOTS - 1) & 1);
      load_boxes<1>(outputs + it % F_SLOTS * REGION, f, at.first_channel, 0, token, bar, policy);
    }
  }
  } else if (warp == DX + DOTS + 2) {
    for (int it = 0; lane == 0 && it < at.tiles; it++) {
      const int stage = it % STAGES, token = (at.group + it * groups) * BT;
      const u32 tile = base + stage * STAGE;
      barrier_wait(finishes + 8 * stage, it / STAGES & 1);
#pragma unroll
      for (int j = 0; j < N; j++) store_boxes<1>(dx, at.first_channel, j, token, tile + REGION_AT(G_AT + j));
      if (DF) store_boxes<1>(df, at.first_channel, 0, token, tile + REGION_AT(DL_AT));
      await_stored();
      MARK(it, 10);
      barrier_arrive(empties + 8 * stage);
    }
  } else {
    const Gradients to = {d_bias, d_alphas, coefficients, partial, done};
    middle(at, groups, T, warp - DX - DOTS - 3, lane, bias, alpha_pre, alpha_post, alpha_res, saved, writer_saved, writer_bias,
           writer_alpha, parts, staging, to);
  }
}
