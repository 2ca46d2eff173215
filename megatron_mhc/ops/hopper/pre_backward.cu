// pre, backward: every gradient from one read of x, g, f and dl. exchange.cuh says how blocks share the work.
//
// Six kinds of warps work on a tile, each a few tiles behind the one before:
//   load    brings g, dl and x into shared memory, a ring of STAGES tiles, and f, which `dots` alone
//           reads, a ring of F_SLOTS
//   dots    computes the 24 products over C that the coefficients' gradients are made of, on the tensor
//           cores: for each token [g_0..g_3, dl] (x_0..x_3, f, f_bias)^T but for dl's with f; the
//           slice's share goes to global memory
//   middle  takes this slice's tokens, up to two at a time (middle.cuh): replays Sinkhorn there and
//           back, which needs no sums, awaits the group's sums, computes the gradient d of the raw
//           projection, and publishes d and the coefficients
//   fetch   awaits those of the whole tile and lays them out in shared memory, FETCHED tiles deep
//   dx      computes dx_j = sum_i h_res[i, j] g_i + h_pre_j dl + (d . phi)_j + s x_j, over g_j; with DF,
//           over dl, the df of the connection that wrote x; accumulates phi's gradient in registers
//   store   copies dx and df out
//
// parts [group, slot, slice, token, 8 atoms] and coefficients [group, slot, token, 17 atoms] are rings of
// EXCHANGE tiles. A block loads tile j after it has finished tile j - STAGES, whose coefficients exist: so
// all sums of that tile have been read. And coefficients exist only after the whole group has loaded a tile.
//
// At the end groups add their share of phi's gradient in turn, and the last block to finish sums up the
// gradients of biases and alphas: every run gives the same bits.
//
// With NORM, dl is the gradient of the norm's output (norm.cuh): `dots` computes <x_i, u> in place of <x_i,
// dl>, of u as bf16 high + low halves; `middle` and `dx` make the layer input's; w's gathers beside phi's.
//
// With PREVIOUS, the layer input was read with h_pre, which another connection made, and whose gradient goes
// to d_h_pre; d_handed_on is what the weights made here get, null for nothing.
//
// x, g, dx [T, 4, C] bf16, f, dl, df [T, C] bf16, weight, d_weight [24, 4 C] fp32, saved [T, 25] fp32,
// partial [MIDDLE blocks, 48] fp32; parts, coefficients and counts [2 + DX SLICES] zeros; norm_saved [T, 5]
// and norm_sums [C] fp32, d_norm [C] in norm_weight's dtype; h_pre, d_handed_on, d_h_pre [T, 4] fp32.
#include "exchange.cuh"
#include "middle.cuh"

constexpr int F_SLOTS = MHC_F_SLOTS;
constexpr int FETCHED = MHC_FETCHED;         // tiles whose coefficients are in shared memory
constexpr int DX = MHC_DX, DOTS = MHC_DOTS;  // warps
constexpr int THREADS = MHC_THREADS;
static_assert((DX + DOTS + 3 + MIDDLE) * 32 == THREADS, "every warp has a role");
static_assert(TILE == 8,
              "a tile is half the left factor of a product, and four tokens for each warp of `dots`");
constexpr int FETCHES = (TILE * COEFFICIENT_ATOMS + 31) / 32;  // atoms that a lane of `fetch` loads

// A stage has nine regions, each a tile's tokens of one tensor. They stand in pairs (k, k + 5), with 128
// bytes between pairs, which keeps the rows of the first five regions off each other's banks, and those of
// the last four.
constexpr int G_AT = 0;   // g, later dx
constexpr int DL_AT = 4;  // dl, later df
constexpr int X_AT = 5;
__device__ __forceinline__ constexpr int region_at(int k) {
    return k % 5 * (2 * REGION + 128) + k / 5 * REGION;
}
constexpr int STAGE = 9 * REGION + 512;
static_assert(REGION % 1024 == 0, "every second stage begins half way between two multiples of 1024");
// So in an odd stage the swizzle permutes a row's chunks otherwise: what `place` gives, with this bit
// changed.
__device__ __forceinline__ constexpr int odd_stage(int stage) {
    return BUG(stages_even) ? 0 : stage % 2 * 64;
}

// Shared memory, in bytes; memory() of pre_backward.py has the same sum.
constexpr int SLOT_BYTES = TILE * TOKEN_FLOATS * 4;  // a tile's coefficients
constexpr int U_AT = F_SLOTS * REGION;               // behind f; with NORM a tile's u, high and low halves
constexpr int STAGES_AT = U_AT + NORM * 2 * REGION;
constexpr int SLOTS_AT = STAGES_AT + STAGES * STAGE;
constexpr int F_BIAS_AT = SLOTS_AT + FETCHED * SLOT_BYTES;  // as a row of boxes: BOX_BYTES apart
constexpr int STAGING_AT = F_BIAS_AT + (BOXES - 1) * BOX_BYTES + BOX * 2;
static_assert(STAGING_AT + MIDDLE * 2 * STAGING * 4 == MHC_SHARED,
              "memory() of pre_backward.py lays out otherwise");

__device__ __forceinline__ u32 load_pair(const unsigned char* p) { return *(const u32*)p; }

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    pre_backward(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap g,
                 const __grid_constant__ TensorMap f, const __grid_constant__ TensorMap dl,
                 const __grid_constant__ TensorMap dx, const __grid_constant__ TensorMap df,
                 const bf16* __restrict__ f_bias, const float* __restrict__ weight,
                 const float* __restrict__ affine, const float* __restrict__ saved,
                 const float* __restrict__ writer_saved, const float* __restrict__ writer_affine,
                 float* d_weight, float* d_affine,
#if MHC_NORM
                 const void* __restrict__ norm_weight, float* __restrict__ norm_saved, void* d_norm,
#endif
#if MHC_PREVIOUS
                 const float* __restrict__ h_pre, const float* __restrict__ d_handed_on,
                 float* __restrict__ d_h_pre,
#endif
                 float* parts, float* coefficients, float* partial, u32* counts,
#if MHC_NORM
                 float* norm_sums, float norm_offset,
#endif
                 int T, int groups) {
#if MHC_NORM
    const Norm norm = {norm_weight, norm_saved, 0.f, norm_offset, norm_sums, d_norm};
#else
    const Norm norm = {};
#endif
#if MHC_PREVIOUS
    const Handed handed = {h_pre, d_handed_on, d_h_pre};
#else
    const Handed handed = {};
#endif
    DYNAMIC_SHARED(memory);
    SHARED_ARRAY(u64, full, STAGES);
    SHARED_ARRAY(u64, finished, STAGES);
    SHARED_ARRAY(u64, empty, STAGES);
    SHARED_ARRAY(u64, fetched, FETCHED);
    SHARED_ARRAY(u64, used, FETCHED);
    SHARED_ARRAY(u64, dotted, F_SLOTS);
    unsigned char *tiles = memory + STAGES_AT, *slots = memory + SLOTS_AT, *bias_row = memory + F_BIAS_AT;
    float* staging = (float*)(memory + STAGING_AT);  // of the middle warps
    const u32 base = shared_address(tiles), outputs = shared_address(memory), fulls = shared_address(full);
    const u32 finishes = shared_address(finished), empties = shared_address(empty);
    const u32 fetches = shared_address(fetched), uses = shared_address(used), dots = shared_address(dotted);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Place at = take_place(counts, T, groups);
    u32 *done = counts + 1, *turns = counts + 2;
    parts += (u64)at.group * EXCHANGE * SLICES * PART;
    coefficients += (u64)at.group * EXCHANGE * (TILE * COEFFICIENT_ATOMS * 4);

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(fulls + 8 * s, 1);
            barrier_init(finishes + 8 * s, DX);
            barrier_init(empties + 8 * s, 1);
        }
        for (int s = 0; s < FETCHED; s++) barrier_init(fetches + 8 * s, 32), barrier_init(uses + 8 * s, DX);
        for (int s = 0; s < F_SLOTS; s++) barrier_init(dots + 8 * s, DOTS);
    }
    for (int c = threadIdx.x; c < WIDTH; c += THREADS)
        ((bf16*)(bias_row + c / BOX * BOX_BYTES))[c % BOX] =
            f_bias && c < at.width ? f_bias[at.first_channel + c] : (bf16)0;
    fence_copies();
    __syncthreads();

    if (warp < DX) {
        set_registers<152>();
        const int own = warp * 16, row = lane / 4, pair = lane % 4 * 2;
        const bool active = own < at.width;
        u32 phi[STREAMS][2][3];  // [stream, 8 channels, rows 2 k of 16, 16, 8]
        float d_phi[STREAMS][3][4] = {};
#pragma unroll
        for (int j = 0; j < STREAMS; j++)
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int k = 0; k < 3; k++) {
                    const float* w = weight + (u64)(k * 8 + pair) * STREAMS * CHANNELS + (u64)j * CHANNELS +
                                     at.first_channel + own + n * 8 + row;
                    phi[j][n][k] = active ? pack(w[0], w[(u64)STREAMS * CHANNELS]) : 0;
                }
        // Where this lane's part of x lies for dphi, two streams a load, and of g, dl and x for dx.
        u32 transposed[STREAMS / 2], pairs[9];
#pragma unroll
        for (int j = 0; j < STREAMS / 2; j++)
            transposed[j] =
                place(region_at(X_AT + 2 * j + lane / 16) + lane % 8 * 128, own / 8 + lane / 8 % 2);
#pragma unroll
        for (int k = 0; k < 9; k++) pairs[k] = place(region_at(k) + row * 128, own / 8) + pair * 2;
        float w[2][2], d_w[2][2] = {};  // of the norm, [8 channels, of a pair]
        if (NORM && active) load_pairs(w, norm, at.first_channel + own + pair);
        for (int it = 0; it < at.tiles; it++) {
            const int stage = it % STAGES, slot = it % FETCHED;
            const u32 odd = odd_stage(stage);
            unsigned char* tile = tiles + stage * STAGE;
            barrier_wait(fulls + 8 * stage, it / STAGES & 1);
            if (!BUG(coefficients_unawaited)) barrier_wait(fetches + 8 * slot, it / FETCHED & 1);
            if (threadIdx.x == 0) MARK(it, 8);
            if (active) {
                const float* coefficient = (const float*)(slots + slot * SLOT_BYTES);
                if constexpr (DPHI) {
                    u32 d_high[3], d_low[3];  // [rows of phi, tokens], two tokens a register
#pragma unroll
                    for (int n = 0; n < 3; n++) {
                        const float* d = coefficient + pair * TOKEN_FLOATS + D_AT + n * 8 + row;
                        d_high[n] = pack(d[0], d[TOKEN_FLOATS]);
                        d_low[n] = pack_rest(d[0], d[TOKEN_FLOATS], d_high[n]);
                    }
#pragma unroll
                    for (int j = 0; j < STREAMS; j += 2) {
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
                const float* h = coefficient + row * TOKEN_FLOATS;
                // [tokens, rows of phi], two rows a register: rows 0 to 7 and 8 to 15 of a left factor.
                u32 high[3], low[3];
#pragma unroll
                for (int k = 0; k < 3; k++) {
                    const float2 d = *(const float2*)(h + D_AT + k * 8 + pair);
                    high[k] = pack(d.x, d.y);
                    low[k] = pack_rest(d.x, d.y, high[k]);
                }
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    float acc[STREAMS][4] = {};
#pragma unroll
                    for (int j = 0; j < STREAMS; j++) {
                        multiply16(acc[j], high[0], low[0], high[1], low[1], phi[j][n][0], phi[j][n][1]);
                        multiply8(acc[j], high[2], low[2], phi[j][n][2]);
                    }
                    // Eight channels on are the other half of 32 bytes.
                    const auto here = [&](int region) { return tile + (pairs[region] ^ n * 16 ^ odd); };
                    const u32 dlv = load_pair(here(DL_AT));
                    const float4 read = *(const float4*)(h + H_PRE_AT);
                    const float from_norm = h[NORM_AT];
                    const float reads[STREAMS] = {read.x, read.y, read.z, read.w};
                    float dl0 = low_half(dlv), dl1 = high_half(dlv);
                    if constexpr (NORM) {
                        float l0 = 0.f, l1 = 0.f;
#pragma unroll
                        for (int j = 0; j < STREAMS; j++) {
                            const u32 xv = load_pair(here(X_AT + j));
                            l0 = __fmaf_rn(reads[j], low_half(xv), l0);
                            l1 = __fmaf_rn(reads[j], high_half(xv), l1);
                        }
                        through_norm(dl0, l0, h[INVERSE_AT], h[ALONG_AT], w[n][0], d_w[n][0]);
                        through_norm(dl1, l1, h[INVERSE_AT], h[ALONG_AT], w[n][1], d_w[n][1]);
                    }
                    float v[STREAMS][2];
#pragma unroll
                    for (int j = 0; j < STREAMS; j++) {
                        const u32 xv = load_pair(here(X_AT + j));
                        v[j][0] = __fmaf_rn(from_norm, low_half(xv),
                                            __fmaf_rn(reads[j], dl0, acc[j][0] + acc[j][2]));
                        v[j][1] = __fmaf_rn(from_norm, high_half(xv),
                                            __fmaf_rn(reads[j], dl1, acc[j][1] + acc[j][3]));
                    }
#pragma unroll
                    for (int i = 0; i < STREAMS; i++) {
                        const u32 gv = load_pair(here(G_AT + i));
                        const float4 mix = *(const float4*)(h + H_RES_AT + 4 * i);
                        const float mixes[STREAMS] = {mix.x, mix.y, mix.z, mix.w};
#pragma unroll
                        for (int j = 0; j < STREAMS; j++) {
                            v[j][0] = __fmaf_rn(mixes[j], low_half(gv), v[j][0]);
                            v[j][1] = __fmaf_rn(mixes[j], high_half(gv), v[j][1]);
                        }
                    }
                    const float4 write =
                        DF ? *(const float4*)(h + H_POST_AT) : make_float4(0.f, 0.f, 0.f, 0.f);
                    const float writes[STREAMS] = {write.x, write.y, write.z, write.w};
                    float sum0 = 0.f, sum1 = 0.f;  // df
#pragma unroll
                    for (int j = 0; j < STREAMS; j++) {
                        const u32 rounded = pack(v[j][0], v[j][1]);
                        *(u32*)here(G_AT + j) = rounded;
                        sum0 = __fmaf_rn(writes[j], low_half(rounded), sum0);
                        sum1 = __fmaf_rn(writes[j], high_half(rounded), sum1);
                    }
                    if constexpr (DF) *(u32*)here(DL_AT) = pack(sum0, sum1);
                }
            }
            fence_copies(), __syncwarp();
            if (threadIdx.x == 0) MARK(it, 9);
            if (lane == 0) barrier_arrive(finishes + 8 * stage), barrier_arrive(uses + 8 * slot);
        }
        u32* turn = turns + at.slice * DX + warp;
        if (!BUG(out_of_turn)) await(turn, at.group, lane);
        if (NORM && active) finish_norm(d_w, norm, at.first_channel + own + pair, at.group, groups, row);
        if (DPHI && active) {
            float* to = d_weight + (u64)pair * STREAMS * CHANNELS + at.first_channel + own + row;
            const auto there = [&](int j, int n, int k) -> float& {
                return to[(u64)(n * 8 + k % 2) * STREAMS * CHANNELS + (u64)j * CHANNELS + k / 2 * 8];
            };
            float before[STREAMS][3][4] = {};
            if (at.group)  // loads all at once: one takes as long as all
#pragma unroll
                for (int j = 0; j < STREAMS; j++)
#pragma unroll
                    for (int n = 0; n < 3; n++)
#pragma unroll
                        for (int k = 0; k < 4; k++) before[j][n][k] = load_fresh(&there(j, n, k));
#pragma unroll
            for (int j = 0; j < STREAMS; j++)
#pragma unroll
                for (int n = 0; n < 3; n++)
#pragma unroll
                    for (int k = 0; k < 4; k++) there(j, n, k) = d_phi[j][n][k] + before[j][n][k];
        }
        publish(turn, lane);
    } else if (warp < DX + DOTS + 2) {
        set_registers<80>();
        if (warp < DX + DOTS) {
            // Two tokens' g and dl, rows 0 to 7 and 8 to 15, are the left factor of two products, with the x,
            // f and f_bias of either.
            const int r = lane % 8, row = lane / 4, pair = lane % 4 * 2, first = (warp - DX) * 4;
            // Which half of 16 channels this lane's row is of.
            const int left_half = lane / 16, right_half = lane / 8 % 2;
            const int left_at = region_at(G_AT + min(r, 4)) + (first + lane / 8 % 2) * 128;
            const int u_at = (r == 4 ? 0 : REGION) + (first + lane / 8 % 2) * 128;  // with NORM
            float w[8];
            if constexpr (NORM) load_weights(w, norm, at, lane);
            const int right_at = r < 4 ? region_at(X_AT + r) : 0, right_token = first + lane / 16;
            for (int it = 0; it < at.tiles; it++) {
                const int stage = it % STAGES;
                float* part = parts + ((it % EXCHANGE) * SLICES + at.slice) * PART;
                const u32 tile = base + stage * STAGE, output = outputs + it % F_SLOTS * REGION;
                u32 left[2], right[2];  // where the rows of two pairs begin
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    left[k] = NORM && r >= 4
                                  ? shared_address(memory + U_AT) + place(u_at + k * 256, left_half)
                                  : tile + (place(left_at + k * 256, left_half) ^ odd_stage(stage));
                    right[k] = r < 4   ? tile + (place(right_at + (right_token + 2 * k) * 128, right_half) ^
                                               odd_stage(stage))
                               : r < 5 ? output + place((right_token + 2 * k) * 128, right_half)
                                       : shared_address(bias_row) + right_half * 16;
                }
                barrier_wait(fulls + 8 * stage, it / STAGES & 1);
                if (warp == DX && lane == 0) MARK(it, 1);
                if constexpr (NORM)
                    lay_out_u(memory + U_AT, tiles + stage * STAGE, region_at(DL_AT), odd_stage(stage), first,
                              w, lane);
                float acc[2][2][4] = {};  // [pair, token of it], independent chains
                // 16 channels on are two chunks, an address that the swizzle changes in two bits.
#pragma unroll
                for (int s = 0; s < WIDTH / 16; s++)
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
                    float v0 = acc[k / 2][k % 2][k % 2 * 2], v1 = acc[k / 2][k % 2][k % 2 * 2 + 1];
                    if constexpr (NORM) add_halves(v0, v1, row);
                    const float next = __shfl_sync(ALL_LANES, pair == 4 ? v0 + v1 : v0, lane + 1);
                    const float even = __shfl_sync(ALL_LANES, v0, 16 + row / 2);
                    const float odd = __shfl_sync(ALL_LANES, v1, 16 + row / 2);
                    float* atom = part + ((first + k) * ATOMS + row * 2 + pair / 2) * 4;
                    if (row < STREAMS && pair == 0) put(atom, v0, v1, next, it + 1);
                    if (row < STREAMS && pair == 2) put(atom, v1, next, row % 2 ? odd : even, it + 1);
                }
                if (lane == 0) barrier_arrive(dots + 8 * (it % F_SLOTS));
                if (warp == DX && lane == 0) MARK(it, 2);
            }
        } else if (warp == DX + DOTS) {
            for (int it = 0; it < at.tiles; it++) {
                const int slot = it % FETCHED;
                Tagged v[FETCHES];
                int offset[FETCHES];
#pragma unroll
                for (int k = 0; k < FETCHES; k++)
                    offset[k] = min(k * 32 + lane, TILE * COEFFICIENT_ATOMS - 1) * 4;
                get_all(v, coefficients + (it % EXCHANGE) * (TILE * COEFFICIENT_ATOMS * 4), offset, it + 1);
                if (lane == 0) MARK(it, 6);
                if (it >= FETCHED && !BUG(coefficients_overwritten))
                    barrier_wait(uses + 8 * slot, (it / FETCHED - 1) & 1);
                float* to = (float*)(slots + slot * SLOT_BYTES);
#pragma unroll
                for (int k = 0; k < FETCHES; k++)
                    if (k * 32 + lane < TILE * COEFFICIENT_ATOMS) {
                        const int token = (k * 32 + lane) / COEFFICIENT_ATOMS;
                        float* atom = to + token * TOKEN_FLOATS + (k * 32 + lane) % COEFFICIENT_ATOMS * 3;
                        atom[0] = v[k].x, atom[1] = v[k].y, atom[2] = v[k].z;
                    }
                __syncwarp();
                if (lane == 0) MARK(it, 7);
                barrier_arrive(fetches + 8 * slot);
            }
        } else if (lane == 0) {
            // One lane alone: another could reach a barrier two phases late, and wait forever.
            const u64 policy = evict_first();
            for (int it = 0; it < at.tiles; it++) {
                const int stage = it % STAGES, token = (at.group + it * groups) * TILE;
                const u32 tile = base + stage * STAGE, bar = fulls + 8 * stage;
                if (it >= STAGES && !BUG(tile_overwritten))
                    barrier_wait(empties + 8 * stage, (it / STAGES - 1) & 1);
                MARK(it, 0);
                barrier_expect(bar, 10 * REGION);
#pragma unroll
                for (int j = 0; j < STREAMS; j++) {
                    load_boxes<1>(tile + region_at(G_AT + j), g, at.first_channel, j, token, bar, policy);
                    load_boxes<1>(tile + region_at(X_AT + j), x, at.first_channel, j, token, bar, policy);
                }
                load_boxes<1>(tile + region_at(DL_AT), dl, at.first_channel, 0, token, bar, policy);
                if (it >= F_SLOTS && !BUG(f_overwritten))
                    barrier_wait(dots + 8 * (it % F_SLOTS), (it / F_SLOTS - 1) & 1);
                load_boxes<1>(outputs + it % F_SLOTS * REGION, f, at.first_channel, 0, token, bar, policy);
            }
        }
    } else if (warp == DX + DOTS + 2) {
        for (int it = 0; lane == 0 && it < at.tiles; it++) {
            const int stage = it % STAGES, token = (at.group + it * groups) * TILE;
            const u32 tile = base + stage * STAGE;
            if (!BUG(dx_unawaited)) barrier_wait(finishes + 8 * stage, it / STAGES & 1);
#pragma unroll
            for (int j = 0; j < STREAMS; j++)
                store_boxes<1>(dx, at.first_channel, j, token, tile + region_at(G_AT + j));
            if (DF) store_boxes<1>(df, at.first_channel, 0, token, tile + region_at(DL_AT));
            if (!BUG(stores_unawaited)) await_stored();
            MARK(it, 10);
            barrier_arrive(empties + 8 * stage);
        }
    } else {
        const Gradients to = {d_affine, coefficients, partial, done};
        middle(at, groups, T, warp - DX - DOTS - 3, lane, affine, saved, writer_saved, writer_affine,
               norm.saved, handed, parts, staging, to);
    }
}
