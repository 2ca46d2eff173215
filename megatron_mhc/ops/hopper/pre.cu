// pre, forward: coefficients and layer input from one read of the streams. exchange.cuh says how blocks share
// the work.
//
// Four kinds of warps work on a tile, each a few tiles behind the one before:
//   load       brings x into shared memory, a ring of STAGES tiles
//   project    computes this slice's share of x . phi^T and of the sum of squares on the tensor cores,
//              with phi as bf16 high + low halves in registers throughout; the shares go to global
//              memory
//   finish     two warps a tile: they await the group's sums and compute h_pre, eight tokens each, for
//              `aggregate`; one of them saves the projection and writes the coefficients of this slice's
//              tokens
//   aggregate  computes l = h_pre . x from shared memory, two tokens at a time
//
// parts [group, slot, slice, token, 36] is a ring of EXCHANGE tiles: 25 numbers as nine atoms, pre 4,
// squares, post 4, res 16. A block loads tile k after it has finished tile k - STAGES, for which it had the
// sums of the whole group. So every block of the group had loaded tile k - STAGES, hence had finished
// tile k - 2 STAGES, whose slot tile k takes.
//
// With MIX, x are the streams in front of the previous connection, whose post_res makes the streams that are
// read here.
//   project    first mixes in place, x'_i = sum_j h_res[i, j] x_j + h_post_i (f + f_bias), 32 channels a
//              warp, and stores x' from shared memory
// f has a ring of its own, F_SLOTS deep. A tile's coefficients (`before`) come with the tile.
//
// With NORM, `out` is the norm's output y. |l|^2 = sum_ij h_i h_j <x_i, x_j> is known before l is, of ten
// products that go with the others through the exchange: 34 numbers as twelve atoms.
//   project    also computes <x_i, x_j> of its slice, eight tokens a warp
//   finish     computes r too, saves <x_i, l> and r, and gives `aggregate` h_pre r
//   aggregate  multiplies by w
//
// With PREVIOUS, the weights to read with are given: h_pre, those of the connection in front, which MIX has
// in `before` too. Those that this one makes go to `handed_on`. So without NORM `aggregate` awaits no sums.
//
// x, streams [T, 4, C], f, out [T, C], f_bias [C] bf16, before, mappings [T, 24] fp32, weight [24, 4 C] fp32,
// saved [T, 25] fp32 (projection / r, 1 / r), norm_saved [T, 5] fp32, h_pre, handed_on [T, 4] fp32, parts and
// ticket zeros. Without MIX, f, streams, f_bias and before are not read.
#include "exchange.cuh"
#include "atoms.cuh"
#include "mix.cuh"

constexpr bool MIX = MHC_MIX;
constexpr int F_SLOTS = MHC_F_SLOTS;
constexpr int PROJECTING = MHC_PROJECTING, AGGREGATING = MHC_AGGREGATING;  // warps
constexpr int THREADS = MHC_THREADS;
static_assert((PROJECTING + AGGREGATING + FINISHING + 1) * 32 == THREADS, "every warp has a role");
static_assert(TILE == 16,
              "a tile is the left factor of a product, and eight tokens for each of a pair of warps");
static_assert(!MIX || STAGES >= F_SLOTS, "f must not run ahead of x");

constexpr int TURNS = 8;            // in which `aggregate` takes a tile; the warps of `aggregate` take turns
constexpr int EACH = TILE / TURNS;  // tokens of a turn
constexpr int STEPS_EACH = STREAMS * WIDTH / 16 / PROJECTING;  // of 16 columns, per warp of `project`
constexpr int SUMS = TILE * (NORM ? ROWS : ATOMS * 3);
static_assert(!NORM || WIDTH <= 256, "a lane of `aggregate` has eight channels");

// Shared memory, in bytes; memory() of pre.py has the same sum.
constexpr int STAGE = STREAMS * REGION;
constexpr int F_AT = STAGES * STAGE;
constexpr int SUMS_AT = F_AT + MIX * F_SLOTS * REGION;                       // [2, PROJECTING, SUMS]
constexpr int GRAM_AT = SUMS_AT + 2 * PROJECTING * SUMS * 4;                 // [2, PROJECTING, GRAM]
constexpr int COEFFICIENTS_AT = GRAM_AT + NORM * 2 * PROJECTING * GRAM * 4;  // [STAGES, TILE, ROWS]
constexpr int LOGITS_AT = COEFFICIENTS_AT + MIX * STAGES * TILE * ROWS * 4;  // [FINISHING, 8, 16]
constexpr int H_PRE_AT = LOGITS_AT + FINISHING * 8 * 16 * 4;                 // [STAGES, TILE, STREAMS]
constexpr int F_BIAS_AT = H_PRE_AT + STAGES * TILE * STREAMS * 4;            // [WIDTH] bf16
static_assert(F_BIAS_AT + MIX * WIDTH * 2 == MHC_SHARED, "memory() of pre.py lays out otherwise");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    pre(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap f,
        const __grid_constant__ TensorMap streams, const bf16* __restrict__ f_bias,
        const float* __restrict__ before, const float* __restrict__ weight, const float* __restrict__ affine,
        bf16* __restrict__ out, float* __restrict__ saved, float* __restrict__ mappings,
#if MHC_NORM
        const void* __restrict__ norm_weight, float* __restrict__ norm_saved,
#endif
#if MHC_PREVIOUS
        const float* __restrict__ h_pre, float* __restrict__ handed_on,
#endif
        float* parts, u32* ticket,
#if MHC_NORM
        float norm_eps, float norm_offset,
#endif
        int T, int groups, float eps) {
#if MHC_NORM
    const Norm norm = {norm_weight, norm_saved, norm_eps, norm_offset};
#else
    const Norm norm = {};
#endif
#if !MHC_PREVIOUS
    const float* h_pre = nullptr;
    float* handed_on = nullptr;
#endif
    DYNAMIC_SHARED(memory);
    SHARED_ARRAY(u64, full, STAGES);
    SHARED_ARRAY(u64, known, STAGES);
    SHARED_ARRAY(u64, empty, STAGES);
    SHARED_ARRAY(u64, mixed, STAGES);  // with MIX
    unsigned char* outputs = memory + F_AT;
    float* sums = (float*)(memory + SUMS_AT);
    float* grams = (float*)(memory + GRAM_AT);
    float* coefficients = (float*)(memory + COEFFICIENTS_AT);
    float* held = (float*)(memory + LOGITS_AT);
    float* reads = (float*)(memory + H_PRE_AT);
    bf16* bias_row = (bf16*)(memory + F_BIAS_AT);
    const u32 tiles = shared_address(memory), fulls = shared_address(full), empties = shared_address(empty);
    const u32 knows = shared_address(known), mixes = shared_address(mixed);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Place at = take_place(ticket, T, groups);
    parts += (u64)at.group * EXCHANGE * SLICES * PART;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(fulls + 8 * s, 1);
            barrier_init(knows + 8 * s, BUG(half_of_h_pre) ? 63 : 64);
            barrier_init(empties + 8 * s, BUG(arrival_uncounted) ? TURNS * 32 + 1 : TURNS * 32 + 2 + MIX);
            if constexpr (MIX) barrier_init(mixes + 8 * s, PROJECTING * 32);
        }
    }
    if constexpr (MIX)
        for (int c = threadIdx.x; c < WIDTH; c += THREADS)
            bias_row[c] = f_bias && c < at.width ? f_bias[at.first_channel + c] : (bf16)0;
    fence_copies();
    __syncthreads();

    if (warp < PROJECTING) {
        set_registers<168>();
        u32 high[STEPS_EACH][3][2], low[STEPS_EACH][3][2];
        const int row = lane / 4, pair = lane % 4 * 2;
#pragma unroll
        for (int s = 0; s < STEPS_EACH; s++) {
            const int step = warp * STEPS_EACH + s, i = step / (WIDTH / 16), c = step % (WIDTH / 16) * 16;
#pragma unroll
            for (int n = 0; n < 3; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float2 w = make_float2(0.f, 0.f);
                    if (c < at.width)
                        w = *(const float2*)(weight + (u64)(n * 8 + row) * STREAMS * CHANNELS +
                                             (u64)i * CHANNELS + at.first_channel + c + pair + 8 * half);
                    high[s][n][half] = pack(w.x, w.y);
                    low[s][n][half] = pack_rest(w.x, w.y, high[s][n][half]);
                }
        }
        // Where this lane's row of the left factor lies. Where a warp has whole boxes, the address two chunks
        // on differs in fixed bits.
        u32 offset[STEPS_EACH % 4 ? STEPS_EACH : 1];
#pragma unroll
        for (int s = 0; s < (STEPS_EACH % 4 ? STEPS_EACH : 1); s++) {
            const int step = warp * STEPS_EACH + s;
            offset[s] =
                place(step / (WIDTH / 16) * REGION + lane % 16 * 128, step % (WIDTH / 16) * 2 + lane / 16);
        }
        // With MIX: this lane's four channels and its first token. Its other tokens lie 2, 8 and 10 rows
        // below. A half warp's two rows are four apart, hence in different banks.
        const int channel = warp * 32 + lane % 8 * 4, first = lane / 8 % 2 * 4 + lane / 16;
        const u32 own_x = place(first * 128, channel / 8) + channel % 8 * 2;
        const uint2 added = MIX && channel < WIDTH ? *(const uint2*)(bias_row + channel) : make_uint2(0, 0);
        for (int it = 0; it < at.tiles; it++) {
            const int stage = it % STAGES;
            if (!BUG(project_hastens)) barrier_wait(fulls + 8 * stage, it / STAGES & 1);
            if (threadIdx.x == 0) MARK(it, 1);
            if constexpr (MIX) {
                // Never waits, since `load` did. compute-sanitizer does not follow the waits of `load`.
                if (it >= STAGES) barrier_wait(empties + 8 * stage, (it / STAGES - 1) & 1);
                if (warp * 32 < WIDTH)
#pragma unroll 2
                    for (int q = 0; q < 4; q++)
                        mix(memory + stage * STAGE, outputs + it % F_SLOTS * REGION,
                            coefficients + (stage * TILE + first + q % 2 * 2 + q / 2 * 8) * ROWS + STREAMS,
                            (own_x ^ q % 2 * 32) + q % 2 * 256 + q / 2 * 1024, added);
                fence_copies();
                barrier_arrive(mixes + 8 * stage);
                if (!BUG(mixing_unawaited)) sync_threads<PROJECTING * 32>(2);
                if (threadIdx.x == 0) {
                    if (it > 0) {
                        if (!BUG(streams_overwritten)) await_stored();  // the last tile's, long done
                        barrier_arrive(empties + 8 * ((it - 1) % STAGES));
                    }
                    store_boxes<STREAMS>(streams, at.first_channel, 0, (at.group + it * groups) * TILE,
                                         tiles + stage * STAGE);
                }
            }
            // The products with the high and with the low halves of phi, as independent chains.
            float acc[3][4] = {}, rest[3][4] = {};
            float square0 = 0.f, square1 = 0.f;
#pragma unroll
            for (int s = 0; s < STEPS_EACH; s++) {
                u32 a[4];
                load_matrices(
                    a, tiles + stage * STAGE +
                           (STEPS_EACH % 4 ? offset[s] : (offset[0] ^ s % 4 * 32) + s / 4 * BOX_BYTES));
#pragma unroll
                for (int n = 0; n < 3; n++) {
                    multiply16(rest[n], a[0], a[1], a[2], a[3], low[s][n][0], low[s][n][1]);
                    multiply16(acc[n], a[0], a[1], a[2], a[3], high[s][n][0], high[s][n][1]);
                }
#pragma unroll
                for (int k = 0; k < 4 && !NORM; k++) {
                    const float square =
                        __fmaf_rn(low_half(a[k]), low_half(a[k]), high_half(a[k]) * high_half(a[k]));
                    if (k % 2)
                        square1 += square;
                    else
                        square0 += square;
                }
            }
            if constexpr (!NORM) square0 = sum_axis<1>(square0), square1 = sum_axis<1>(square1);
            float* buffer = sums + (BUG(sums_overwritten) ? 0 : it & 1) * (PROJECTING * SUMS);
            // In the order of atoms: squares behind pre.
            float* own = buffer + warp * SUMS + row * (NORM ? ROWS : ATOMS * 3);
            if constexpr (NORM) {
#pragma unroll
                for (int n = 0; n < 3; n++) {
                    float2* to = (float2*)(own + n * 8 + pair);
                    to[0] = make_float2(acc[n][0] + rest[n][0], acc[n][1] + rest[n][1]);
                    to[8 * ROWS / 2] = make_float2(acc[n][2] + rest[n][2], acc[n][3] + rest[n][3]);
                }
                gram(grams + ((BUG(gram_overwritten) ? 0 : it & 1) * PROJECTING + warp) * GRAM,
                     tiles + stage * STAGE, warp % 2 * 8, warp / 2, lane);
            } else {
#pragma unroll
                for (int n = 0; n < 3; n++) {
                    const int at_n = n * 8 + pair + (n > 0 || pair >= STREAMS);
                    own[at_n] = acc[n][0] + rest[n][0];
                    own[at_n + 1] = acc[n][1] + rest[n][1];
                    own[8 * (ATOMS * 3) + at_n] = acc[n][2] + rest[n][2];
                    own[8 * (ATOMS * 3) + at_n + 1] = acc[n][3] + rest[n][3];
                }
                if (pair == 0) own[STREAMS] = square0, own[8 * (ATOMS * 3) + STREAMS] = square1;
            }
            if (!BUG(sums_unawaited)) sync_threads<PROJECTING * 32>(1);
            if (threadIdx.x < TILE * ATOMS) {
                float total[3] = {};
                if constexpr (NORM) {
                    const int token = threadIdx.x / ATOMS, atom = threadIdx.x % ATOMS;
#pragma unroll
                    for (int k = 0; k < 3; k++)
                        total[k] = of_gram(atom, k)
                                       ? sum_gram<PROJECTING>(grams + (BUG(gram_overwritten) ? 0 : it & 1) *
                                                                          PROJECTING * GRAM,
                                                              token, pair_of(atom, k))
                                       : sum_projection<PROJECTING>(buffer, token, row_of(atom, k));
                } else {
#pragma unroll
                    for (int w = 0; w < PROJECTING; w++)
#pragma unroll
                        for (int k = 0; k < 3; k++) total[k] += buffer[w * SUMS + 3 * threadIdx.x + k];
                }
                put(parts + ((it % EXCHANGE) * SLICES + at.slice) * PART +
                        ATOM_AT(threadIdx.x / ATOMS, threadIdx.x % ATOMS),
                    total[0], total[1], total[2], BUG(wrong_tag) ? it : it + 1);
            }
            if (threadIdx.x == 0) MARK(it, 2);
        }
        if (MIX && threadIdx.x == 0) await_stored();
    } else {
        set_registers<88>();
        if (warp < PROJECTING + AGGREGATING) {
            float w[8];  // of this lane's channels
            if constexpr (NORM)
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    const int c = min(lane * 8, WIDTH - 8) + e;
                    w[e] = c < at.width ? norm[at.first_channel + c] : 0.f;
                }
            for (int turn = warp - PROJECTING; turn < at.tiles * TURNS; turn += AGGREGATING) {
                const int it = turn / TURNS, first = turn % TURNS * EACH, stage = it % STAGES;
                barrier_wait(fulls + 8 * stage, it / STAGES & 1);
                if constexpr (MIX) barrier_wait(mixes + 8 * stage, it / STAGES & 1);
                if ((!PREVIOUS || NORM) && !BUG(h_pre_unawaited))
                    barrier_wait(knows + 8 * stage, it / STAGES & 1);
                if (first == 0 && lane == 0) MARK(it, 8);
#pragma unroll
                for (int k = first; k < first + EACH; k++) {
                    const int t = (at.group + it * groups) * TILE + k;
                    const float4 read =
                        *(const float4*)(!PREVIOUS || NORM ? reads + (stage * TILE + k) * STREAMS
                                         : MIX             ? coefficients + (stage * TILE + k) * ROWS
                                                           : h_pre + (u64)min(t, T - 1) * STREAMS);
                    const float h[STREAMS] = {read.x, read.y, read.z, read.w};
                    // Only the store has a condition, so that tokens overlap.
#pragma unroll
                    for (int c0 = 0; c0 < WIDTH; c0 += 256) {
                        const int c = min(c0 + lane * 8, WIDTH - 8);
                        float l[8] = {};
#pragma unroll
                        for (int j = 0; j < STREAMS; j++) {
                            const uint4 four =
                                *(const uint4*)(memory + stage * STAGE + place(j * REGION + k * 128, c / 8));
                            const u32 v4[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                            for (int e = 0; e < 4; e++) {
                                l[2 * e] = __fmaf_rn(h[j], low_half(v4[e]), l[2 * e]);
                                l[2 * e + 1] = __fmaf_rn(h[j], high_half(v4[e]), l[2 * e + 1]);
                            }
                        }
                        if constexpr (NORM)
#pragma unroll
                            for (int e = 0; e < 8; e++) l[e] = __fmul_rn(l[e], w[e]);
                        if (t < T && c0 + lane * 8 < at.width)
                            *(uint4*)(out + (u64)t * CHANNELS + at.first_channel + c) = make_uint4(
                                pack(l[0], l[1]), pack(l[2], l[3]), pack(l[4], l[5]), pack(l[6], l[7]));
                    }
                }
                if (first == TILE - EACH && lane == 0) MARK(it, 5);
                // Every lane, for what it has read itself.
                if (!BUG(arrival_missing)) barrier_arrive(empties + 8 * stage);
            }
        } else if (warp < PROJECTING + AGGREGATING + FINISHING) {
            // One token at a time; the logits of eight go through Sinkhorn together, four lanes a token.
            float* logits = held + (warp - PROJECTING - AGGREGATING) * (8 * 16);
            const int m = lane < ROWS ? lane : 0;
            const float* alphas = affine + ROWS;
            const float gate = alphas[m < STREAMS ? 0 : m < 2 * STREAMS ? 1 : 2];
            const float shift = affine[m];
            const float gate_pre = alphas[0], shift_pre = affine[lane % STREAMS];
            int tokens = 0, mine = 0;  // how many are held, and which is this lane's
            const int half = warp - PROJECTING - AGGREGATING & 1, first = half * 8;
            for (int it = (warp - PROJECTING - AGGREGATING) / 2; it < at.tiles; it += FINISHING / 2) {
                const int stage = it % STAGES, tile = at.group + it * groups;
                const float* of_tile = parts + (it % EXCHANGE) * SLICES * PART;
                if (half == 0 && lane == 0) MARK(it, 7);
                await_slices(of_tile + ATOM_AT(first, 0), at.slice, PART, it + 1, lane);
                if (half == 0 && lane == 0) MARK(it, 3);
                if constexpr (NORM) {
                    read_scaled(reads + (stage * TILE + first) * STREAMS, of_tile, first, tile * TILE, it,
                                at.slice, T, lane, gate_pre, shift_pre, eps, h_pre, norm);
                } else if constexpr (!PREVIOUS) {
                    // Either half of the lanes sums up every second slice. Then lane 2 t has pre 0 to 2 of
                    // token t, and lane 2 t + 1 has pre 3 and the squares.
                    const float3 some = sum_slices<2, LOADS>(of_tile + ATOM_AT(first, 0) + lane % 16 * 4,
                                                             lane / 16, PART, it + 1);
                    const float3 read = add_lanes(some, lane % 16, lane % 16 + 16);
                    const float inverse =
                        rsqrtf(__fmaf_rn(__shfl_sync(ALL_LANES, read.y, 2 * (lane / STREAMS) + 1),
                                         1.f / (STREAMS * CHANNELS), eps));
                    const float product = pick(read, 6 * (lane / STREAMS) + lane % STREAMS);
                    reads[(stage * TILE + first) * STREAMS + lane] =
                        sigmoid(__fmaf_rn(__fmul_rn(product, inverse), gate_pre, shift_pre)) +
                        (V4 ? EPS : 0.f);
                }
                barrier_arrive(knows + 8 * stage);
                if (half == 0 && lane == 0) MARK(it, 4);
                // This warp writes the coefficients of every second tile.
                int r = it / (FINISHING / 2) % 2 == half ? own_token(at, it) : TILE;
                if (r >= TILE && lane == 0) barrier_arrive(empties + 8 * stage);
                for (; r < TILE; r += SLICES) {
                    const float3 some = sum_slices<2, LOADS>(of_tile + ATOM_AT(r, min(lane % 16, ATOMS - 1)),
                                                             lane / 16, PART, it + 1);
                    const float3 total = add_lanes(some, lane % 16, lane % 16 + 16);
                    if (r + SLICES >= TILE && lane == 0) MARK(it, 6);
                    if (r + SLICES >= TILE && lane == 0) barrier_arrive(empties + 8 * stage);
                    float squares;
                    if constexpr (NORM)
                        squares = (pick(total, 1) + pick(total, 4)) + (pick(total, 7) + pick(total, 10));
                    else
                        squares = pick(total, STREAMS);
                    const int number =
                        NORM ? m < STREAMS ? 3 * m : 3 * READ + m - STREAMS : m + (m >= STREAMS);
                    const float inverse = rsqrtf(__fmaf_rn(squares, 1.f / (STREAMS * CHANNELS), eps));
                    const float u = __fmul_rn(pick(total, number), inverse), z = __fmaf_rn(u, gate, shift);
                    const int t = tile * TILE + r;
                    if (t < T) {
                        if (lane <= ROWS) saved[(u64)t * 25 + lane] = lane < ROWS ? u : inverse;
                        if (lane < 2 * STREAMS) {
                            const float s = sigmoid(z);
                            const float h = lane < STREAMS ? s + (V4 ? EPS : 0.f) : 2.f * s;
                            mappings[(u64)t * ROWS + lane] = h;
                            if (PREVIOUS && lane < STREAMS) handed_on[(u64)t * STREAMS + lane] = h;
                        }
                        if (lane >= 2 * STREAMS && lane < ROWS) logits[tokens * 16 + lane - 2 * STREAMS] = z;
                        if (lane / 4 == tokens) mine = t;
                        if (++tokens == 8) finish_held(logits, 8, mine, lane, mappings), tokens = 0;
                    }
                }
            }
            finish_held(logits, tokens, mine, lane, mappings);
        } else if (BUG(all_lanes_wait) || (BUG(two_lanes_load) ? lane < 2 : lane == 0)) {
            // One lane alone: another could reach a barrier two phases late, and wait forever.
            const bool copies = !BUG(all_lanes_wait) || lane == 0;
            const u64 policy = evict_first();
            for (int it = 0; it < at.tiles; it++) {
                const int stage = it % STAGES, token = (at.group + it * groups) * TILE;
                const u32 bar = fulls + 8 * stage;
                if (it >= STAGES)
                    barrier_wait(empties + 8 * stage,
                                 (BUG(other_parity) ? it / STAGES : it / STAGES - 1) & 1);
                u32 bytes = 0;  // of coefficients
                if constexpr (MIX) {
                    const int past = it - F_SLOTS;
                    if (past >= 0)
                        barrier_wait(mixes + 8 * (past % STAGES),
                                     (past / STAGES & 1) ^ BUG(mixed_f_overwritten));
                    bytes = min(TILE, T - token) * (ROWS * 4);
                }
                MARK(it, 0);
                if (!copies) continue;
                barrier_expect(bar, STAGE + MIX * REGION + (BUG(before_unawaited) ? bytes / 2 : bytes));
                load_boxes<STREAMS>(tiles + stage * STAGE, x, at.first_channel, 0, token, bar, policy);
                if constexpr (MIX) {
                    load_boxes<1>(shared_address(outputs) + it % F_SLOTS * REGION, f, at.first_channel, 0,
                                  token, bar, policy);
                    load_bytes(shared_address(coefficients + stage * TILE * ROWS), before + (u64)token * ROWS,
                               bytes, bar);
                }
            }
        }
    }
}
