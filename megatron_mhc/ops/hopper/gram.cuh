// With NORM, `pre` knows |l|^2 = sum_ij h_i h_j <x_i, x_j>, h = h_pre, of ten products of streams, before l.
#pragma once

#include "norm.cuh"
#include "sinkhorn.cuh"

constexpr int PAIRS = 10;               // of a token
constexpr int GRAM = TILE / 2 * PAIRS;  // of the tokens of a warp of `project`

// <x_i, x_j> of eight tokens, first to first + 7, of every fourth 16 channels from `step` on: those of token
// lane / 4 on the lane that lies on the diagonal, where it is written to `to`.
__device__ __forceinline__ void gram(float* to, u32 tile, int first, int step, int lane) {
    // The left factor of a product are two streams of the tokens, the right factor is a third: the products
    // of a token with itself are on two diagonals. So five products have ten pairs.
    constexpr int LEFT[5][2] = {{0, 1}, {2, 3}, {1, 2}, {2, 3}, {3, 1}}, RIGHT[5] = {0, 0, 1, 2, 3};
    float acc[5][4] = {};
    // Lanes 8 k to 8 k + 7 have the rows of channels 0 to 7 (k even) or 8 to 15 of stream k / 2 of two. 16
    // channels on are two chunks, an address that the swizzle changes in two bits.
    const u32 own = tile + place(lane / 16 * REGION + (first + lane % 8) * 128, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < WIDTH / 64; k++) {
        u32 v[2][4];  // two streams each, the two halves of 16 channels
#pragma unroll
        for (int j = 0; j < 2; j++) load_matrices(v[j], (own ^ step * 32) + 2 * j * REGION + k * BOX_BYTES);
#pragma unroll
        for (int p = 0; p < 5; p++) {
            const int i = LEFT[p][0], i1 = LEFT[p][1], j = RIGHT[p];
            multiply16(acc[p], v[i / 2][i % 2 * 2], v[i1 / 2][i1 % 2 * 2], v[i / 2][i % 2 * 2 + 1],
                       v[i1 / 2][i1 % 2 * 2 + 1], v[j / 2][j % 2 * 2], v[j / 2][j % 2 * 2 + 1]);
        }
    }
    const int row = lane / 4;
    if (lane % 4 == row / 2 || BUG(off_diagonal))
#pragma unroll
        for (int p = 0; p < 5; p++) {
            to[row * PAIRS + 2 * p] = row % 2 ? acc[p][1] : acc[p][0];
            to[row * PAIRS + 2 * p + 1] = row % 2 ? acc[p][3] : acc[p][2];
        }
}

// ---- the atoms of a token ----
//
// Atom i of the first four has pre i, <x_i, x_i> and <x_i, x_i+1>, the fifth <x_0, x_2> and <x_1, x_3>,
// others the rest of the projection.

__device__ __forceinline__ bool of_gram(int atom, int k) {
    return atom == STREAMS || (atom < STREAMS && k > 0);
}
// Where `gram` puts a number of an atom: its order is 00 01 02 03 11 12 22 23 33 13.
__device__ __forceinline__ int pair_of(int atom, int k) {
    k += atom == STREAMS;
    return (int)((k == 1 ? 0x28640u : 0x93751u) >> 4 * atom & 15);
}
// Which row of phi a number of an atom is of. The last atom has a number to spare.
__device__ __forceinline__ int row_of(int atom, int k) {
    return atom < STREAMS ? atom : min(STREAMS + (atom - STREAMS - 1) * 3 + k, ROWS - 1);
}
// Sums of a token over the warps: of all, or of those that have computed <x_i, x_j> of this token.
template <int WARPS>
__device__ __forceinline__ float sum_projection(const float* from, int token, int row) {
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += from[(w * TILE + token) * ROWS + row];
    return total;
}
template <int WARPS>
__device__ __forceinline__ float sum_gram(const float* from, int token, int pair) {
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w += 2) total += from[(w + token / 8) * GRAM + token % 8 * PAIRS + pair];
    return total;
}

// ---- the norm of l, where h_pre is known ----

// What one of the four lanes that have a token knows of l: <x_i, l> of its stream, and r.
struct Read {
    float with_l, inverse_rms;
};
// h: h_pre of the lane's stream i; quad: its atom; across: that of <x_0, x_2> and <x_1, x_3>.
__device__ __forceinline__ Read read_norm(float h, float3 quad, float3 across, int lane, float eps) {
    const int i = lane % STREAMS, token = lane - i;
    const float h1 = __shfl_sync(ALL_LANES, h, token + (i + 1) % STREAMS);
    const float h2 = __shfl_sync(ALL_LANES, h, token + (i + 2) % STREAMS);
    const float h3 = __shfl_sync(ALL_LANES, h, token + (i + 3) % STREAMS);
    const float before = __shfl_sync(ALL_LANES, quad.z, token + (i + 3) % STREAMS);
    Read v;
    v.with_l = __fmaf_rn(h1, quad.z, __fmul_rn(h, quad.y));
    v.with_l = __fmaf_rn(h2, i % 2 ? across.y : across.x, __fmaf_rn(h3, before, v.with_l));
    const float square = sum_axis<1>(__fmul_rn(h, v.with_l));
    v.inverse_rms = rsqrtf(__fmaf_rn(square < 0.f ? 0.f : square, 1.f / CHANNELS, eps));
    return v;
}
