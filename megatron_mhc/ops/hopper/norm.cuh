// The RMSNorm between `pre` and F, which the kernels compute where MHC_NORM asks for it: y = w l r,
// r = 1 / rms(l), l = sum_i h_pre_i x_i. Backward, u = w dy, dl = r (u - k l), k = r^2 <l, u> / C, and
// <x_i, dl> = r (<x_i, u> - k <x_i, l>), whose last product forward keeps.
#pragma once

#include "exchange.cuh"

constexpr bool NORM = MHC_NORM != 0;  // 1: of weights in fp32, 2: in bf16
constexpr int KEPT = STREAMS + 1;     // numbers of a token that forward keeps: <x_i, l>, then r

struct Norm {
    const void* weight;  // [CHANNELS]
    float* saved;        // [T, KEPT]: written in pre, read in its backward
    float eps, offset;   // offset: what is added to weight, 1 if that is zero-centred
    float* sums;         // backward: [CHANNELS], of the weight's gradient on the way
    void* gradient;      // and of all tokens

    __device__ __forceinline__ float operator[](int channel) const {
        const float w =
            MHC_NORM == 2 ? low_half(((const bf16*)weight)[channel]) : ((const float*)weight)[channel];
        return w + offset;
    }
};

// ---- backward ----

// Whose channels a lane of `dots` has, eight of them, of every TOKENS-th token.
constexpr int CHUNKS = WIDTH / 8, TOKENS = 32 / (CHUNKS < 32 ? CHUNKS : 32);

__device__ __forceinline__ void load_weights(float (&w)[8], const Norm& norm, const Place& at, int lane) {
#pragma unroll
    for (int e = 0; e < 8; e++) {
        const int c = lane % CHUNKS * 8 + e;
        w[e] = c < at.width ? norm[at.first_channel + c] : 0.f;
    }
}
// The weights of channels c, c + 1, c + 8 and c + 9.
__device__ __forceinline__ void load_pairs(float (&w)[2][2], const Norm& norm, int c) {
#pragma unroll
    for (int k = 0; k < 4; k++) w[k / 2][k % 2] = norm[c + k / 2 * 8 + k % 2];
}
// Writes u = w dl of four tokens from `first` on: high halves as a region at `to`, low halves as the next
// one.
__device__ __forceinline__ void lay_out_u(unsigned char* to, const unsigned char* tile, int dl, int odd,
                                          int first, const float (&w)[8], int lane) {
#pragma unroll
    for (int token = 0; token < 4; token += TOKENS) {
        const u32 here = place((first + token + lane / CHUNKS) * 128, lane % CHUNKS);
        const uint4 four =
            *(const uint4*)(tile + (place(dl + (first + token + lane / CHUNKS) * 128, lane % CHUNKS) ^ odd));
        const u32 v4[4] = {four.x, four.y, four.z, four.w};
        u32 high[4], low[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float u0 = low_half(v4[e]) * w[2 * e], u1 = high_half(v4[e]) * w[2 * e + 1];
            high[e] = pack(u0, u1);
            low[e] = pack_rest(u0, u1, high[e]);
        }
        *(uint4*)(to + here) = make_uint4(high[0], high[1], high[2], high[3]);
        *(uint4*)(to + REGION + here) = make_uint4(low[0], low[1], low[2], low[3]);
    }
    __syncwarp();
}
// Adds this group's share of the gradient of four channels' weights, c, c + 1, c + 8 and c + 9, in which
// lanes of one pair have eight tokens each, to what earlier groups have left in `norm.sums`; the last one
// rounds.
__device__ __forceinline__ void finish_norm(const float (&share)[2][2], const Norm& norm, int c, int group,
                                            int groups, int row) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
        float v[2];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            v[k] = share[n][k];
#pragma unroll
            for (int step = 4; step < 32; step *= 2) v[k] += __shfl_xor_sync(ALL_LANES, v[k], step);
        }
        if (row > 0) continue;
        const int at = c + 8 * n;
        if (group) v[0] += load_fresh(norm.sums + at), v[1] += load_fresh(norm.sums + at + 1);
        if (group < groups - 1)
            *(float2*)(norm.sums + at) = make_float2(v[0], v[1]);
        else if (MHC_NORM == 2)
            *(u32*)((bf16*)norm.gradient + at) = pack(v[0], v[1]);
        else
            *(float2*)((float*)norm.gradient + at) = make_float2(v[0], v[1]);
    }
}
// The gradient of a channel's l from that of y, `dl`, whose place it takes; adds a token's to that of the
// weight.
__device__ __forceinline__ void through_norm(float& dl, float l, float inverse, float along, float w,
                                             float& d_w) {
    d_w = __fmaf_rn(dl, l * inverse, d_w);
    dl = __fmaf_rn(-along, l, inverse * w * dl);
}
// Rows 4 and 5 of the products of `dots` are x with either half of u: row 4 gets their sum.
__device__ __forceinline__ void add_halves(float& v0, float& v1, int row) {
    const float other0 = __shfl_xor_sync(ALL_LANES, v0, 4), other1 = __shfl_xor_sync(ALL_LANES, v1, 4);
    if (row == STREAMS && !BUG(half_of_u)) v0 += other0, v1 += other1;
}
