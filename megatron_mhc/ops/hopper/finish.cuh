// The warps of pre.cu between the sums of a slice and the layer input. From the sums of a token over all
// channels they compute its coefficients, and with NORM the norm's factor.
#pragma once

#include "exchange.cuh"
#include "gram.cuh"
#include "sinkhorn.cuh"

constexpr int LOADS = MHC_LOADS;                                           // slices that a lane loads a round
constexpr int QUAD_LOADS = MHC_QUAD_LOADS, CROSS_LOADS = MHC_CROSS_LOADS;  // the same with NORM
constexpr int FINISHING = MHC_FINISHING;                                   // warps, in pairs
constexpr int ATOMS = MHC_ATOMS;  // that hold a token's 25 or 34 numbers
constexpr int PART = MHC_PART;    // floats of a slice's share of a tile's sums
static_assert(PART == TILE * ATOMS * 4, "an atom has four words");

// Where an atom of a token is in a part: first the READ atoms that h_pre is made of, of all tokens; then
// every token's rest. A macro, since as a function it makes registers spill at some widths.
// With NORM they are five. Atom i of four has pre i, <x_i, x_i> and <x_i, x_i+1>, the fifth, which stands
// behind those of all tokens, <x_0, x_2> and <x_1, x_3>.
constexpr int READ = NORM ? 5 : 2;
#define REST_AT(token, atom) (TILE * READ + (token) * (ATOMS - READ) + (atom) - READ)
#if MHC_NORM
#define ATOM_AT(token, atom)                                                                                 \
    (((atom) < STREAMS    ? (token) * STREAMS + (atom)                                                       \
      : (atom) == STREAMS ? TILE * STREAMS + (token)                                                         \
                          : REST_AT(token, atom)) *                                                          \
     4)
#else
#define ATOM_AT(token, atom) (((atom) < READ ? (token) * READ + (atom) : REST_AT(token, atom)) * 4)
#endif

// H_res of up to eight tokens: lane 4 k + i computes row i of token k, whose number in the sequence is t.
__device__ __forceinline__ void finish_held(const float* logits, int tokens, int t, int lane,
                                            float* mappings) {
    __syncwarp();
    if (tokens == 0) return;
    const float4 z =
        lane / 4 < tokens ? *(const float4*)(logits + lane * 4) : make_float4(0.f, 0.f, 0.f, 0.f);
    float h[STREAMS] = {z.x, z.y, z.z, z.w};
    sinkhorn_rows(h);
    if (lane / 4 < tokens) {
        float* to = mappings + (u64)t * ROWS + 2 * STREAMS;
        const int i = lane % 4;
        if (V4)
#pragma unroll
            for (int j = 0; j < STREAMS; j++) to[j * STREAMS + i] = h[j];  // comb is H_res transposed
        else
            *(float4*)(to + i * STREAMS) = make_float4(h[0], h[1], h[2], h[3]);
    }
    __syncwarp();
}

// Warp `turn` of FINISHING, of a pair that has every second tile.
__device__ __forceinline__ void finish(const Place at, int groups, int T, int turn, int lane,
                                       const float* __restrict__ affine, float eps, const float* parts,
                                       float* held, float* reads, u32 knows, u32 empties,
                                       float* __restrict__ saved, float* __restrict__ mappings,
                                       const Norm norm) {
    // One token at a time; the logits of eight go through Sinkhorn together, four lanes a token.
    float* logits = held + turn * (8 * 16);
    const int m = lane < ROWS ? lane : 0;
    const float* alphas = affine + ROWS;
    const float gate = alphas[m < STREAMS ? 0 : m < 2 * STREAMS ? 1 : 2];
    const float shift = affine[m];
    const float gate_pre = alphas[0], shift_pre = affine[lane % STREAMS];
    int tokens = 0, mine = 0;  // how many are held, and which is this lane's
    const int half = turn & 1, first = half * 8;
    for (int it = turn / 2; it < at.tiles; it += FINISHING / 2) {
        const int stage = it % STAGES, tile = at.group + it * groups;
        const float* of_tile = parts + (it % EXCHANGE) * SLICES * PART;
        if (half == 0 && lane == 0) MARK(it, 7);
        await_slices(of_tile + ATOM_AT(first, 0), at.slice, PART, it + 1, lane);
        if (half == 0 && lane == 0) MARK(it, 3);
        if constexpr (NORM) {
            // Lane 4 t + i has pre i of token t.
            const float3 quad =
                sum_slices<1, QUAD_LOADS>(of_tile + ATOM_AT(first, 0) + lane * 4, 0, PART, it + 1);
            float3 across = sum_slices<4, CROSS_LOADS>(of_tile + ATOM_AT(first + lane / 4, STREAMS), lane % 4,
                                                       PART, it + 1);
            across.x = sum_axis<1>(across.x), across.y = sum_axis<1>(across.y);
            const float inverse = rsqrtf(__fmaf_rn(sum_axis<1>(quad.y), 1.f / (STREAMS * CHANNELS), eps));
            const float h =
                sigmoid(__fmaf_rn(__fmul_rn(quad.x, inverse), gate_pre, shift_pre)) + (V4 ? EPS : 0.f);
            const Read v = read_norm(h, quad, across, lane, norm.eps);
            reads[(stage * TILE + first) * STREAMS + lane] = __fmul_rn(h, v.inverse_rms);
            const int r = first + lane / STREAMS, t = tile * TILE + r;
            if ((TILE * it + r) % SLICES == at.slice && t < T) {
                norm.saved[(u64)t * KEPT + lane % STREAMS] = v.with_l;
                if (lane % STREAMS == 0) norm.saved[(u64)t * KEPT + STREAMS] = v.inverse_rms;
            }
        } else {
            // Either half of the lanes sums up every second slice. Then lane 2 t has pre 0 to 2 of
            // token t, and lane 2 t + 1 has pre 3 and the squares.
            const float3 some =
                sum_slices<2, LOADS>(of_tile + ATOM_AT(first, 0) + lane % 16 * 4, lane / 16, PART, it + 1);
            const float3 read = add_lanes(some, lane % 16, lane % 16 + 16);
            const float inverse = rsqrtf(__fmaf_rn(__shfl_sync(ALL_LANES, read.y, 2 * (lane / STREAMS) + 1),
                                                   1.f / (STREAMS * CHANNELS), eps));
            const float product = pick(read, 6 * (lane / STREAMS) + lane % STREAMS);
            reads[(stage * TILE + first) * STREAMS + lane] =
                sigmoid(__fmaf_rn(__fmul_rn(product, inverse), gate_pre, shift_pre)) + (V4 ? EPS : 0.f);
        }
        barrier_arrive(knows + 8 * stage);
        if (half == 0 && lane == 0) MARK(it, 4);
        // This warp writes the coefficients of every second tile.
        int r = it / (FINISHING / 2) % 2 == half ? own_token(at, it) : TILE;
        if (r >= TILE && lane == 0) barrier_arrive(empties + 8 * stage);
        for (; r < TILE; r += SLICES) {
            // With NORM in the order above, since h_pre has to have the same bits.
            float3 total;
            if constexpr (NORM) {
                total =
                    sum_slices<1, QUAD_LOADS>(of_tile + ATOM_AT(r, min(lane, ATOMS - 1)), 0, PART, it + 1);
            } else {
                const float3 some = sum_slices<2, LOADS>(of_tile + ATOM_AT(r, min(lane % 16, ATOMS - 1)),
                                                         lane / 16, PART, it + 1);
                total = add_lanes(some, lane % 16, lane % 16 + 16);
            }
            if (r + SLICES >= TILE && lane == 0) MARK(it, 6);
            if (r + SLICES >= TILE && lane == 0) barrier_arrive(empties + 8 * stage);
            float squares;
            if constexpr (NORM)
                squares = (pick(total, 1) + pick(total, 4)) + (pick(total, 7) + pick(total, 10));
            else
                squares = pick(total, STREAMS);
            const int number = NORM ? m < STREAMS ? 3 * m : 3 * READ + m - STREAMS : m + (m >= STREAMS);
            const float inverse = rsqrtf(__fmaf_rn(squares, 1.f / (STREAMS * CHANNELS), eps));
            const float u = __fmul_rn(pick(total, number), inverse), z = __fmaf_rn(u, gate, shift);
            const int t = tile * TILE + r;
            if (t < T) {
                if (lane <= ROWS) saved[(u64)t * 25 + lane] = lane < ROWS ? u : inverse;
                if (lane < 2 * STREAMS) {
                    const float s = sigmoid(z);
                    mappings[(u64)t * ROWS + lane] = lane < STREAMS ? s + (V4 ? EPS : 0.f) : 2.f * s;
                }
                if (lane >= 2 * STREAMS && lane < ROWS) logits[tokens * 16 + lane - 2 * STREAMS] = z;
                if (lane / 4 == tokens) mine = t;
                if (++tokens == 8) finish_held(logits, 8, mine, lane, mappings), tokens = 0;
            }
        }
    }
    finish_held(logits, tokens, mine, lane, mappings);
}
