// The warps of pre_backward.cu between the products and dx. From the sums of a token over all channels they
// compute the gradient of its logits, and the coefficients that dx is made of.
#pragma once

#include "exchange.cuh"
#include "norm.cuh"
#include "sinkhorn.cuh"

constexpr int MIDDLE = MHC_MIDDLE;      // such warps
constexpr int TOGETHER = MHC_TOGETHER;  // tokens that such a warp prepares at once: one, or one in each half
constexpr int LOADS = MHC_LOADS;        // slices that a lane loads a round
constexpr bool DF = MHC_DF;             // df of the connection that wrote x is wanted
constexpr bool DPHI = MHC_DPHI;         // phi's gradient is wanted
// Atoms of a token's sums: g_i with x_0 to x_2, and g_i with x_3, g_i with f and its bias, dl (or u) with
// x_i.
constexpr int ATOMS = MHC_ATOMS;
constexpr int PART = MHC_PART;  // floats of a slice's share of a tile's sums
static_assert(PART == TILE * ATOMS * 4, "an atom has four words");

// Where the coefficients are among a token's numbers, in shared memory; three of them make an atom.
constexpr int COEFFICIENT_ATOMS = MHC_COEFFICIENT_ATOMS;
constexpr int H_RES_AT = 0, H_PRE_AT = 16;
constexpr int H_POST_AT = 20;                   // of the connection that wrote x
constexpr int NORM_AT = 24;                     // s
constexpr int INVERSE_AT = 25;                  // with NORM, r
constexpr int D_AT = 26;                        // the gradient of the raw projection
constexpr int ALONG_AT = 50;                    // with NORM, r k
constexpr int TOKEN_FLOATS = MHC_TOKEN_FLOATS;  // from one token to the next
static_assert(D_AT + ROWS <= ALONG_AT && ALONG_AT < 3 * COEFFICIENT_ATOMS &&
                  3 * COEFFICIENT_ATOMS <= TOKEN_FLOATS,
              "all have a place");
// Floats of half a warp: a token's coefficients, a matrix, scaling vectors.
constexpr int STAGING = TOKEN_FLOATS + 16 + 8 * ITERATIONS;

struct Handed {  // with PREVIOUS, [T, STREAMS] each
    const float *h_pre, *d_handed_on;
    float* d_h_pre;
};

struct Gradients {
    float *d_affine, *coefficients, *partial;
    u32* done;
};

// Sums d_affine over `rows` warps' shares of 48 columns: biases, then alphas' terms in this order.
__device__ void reduce(const float* partial, int rows, float* d_affine, int lane) {
    const int half = lane / 16, column = lane % 16;
    float4 total = make_float4(0, 0, 0, 0);
    if (column < 12)
#pragma unroll 16
        for (int r = half; r < rows; r += 2) {
            const float4 v = load_fresh4(partial + r * 48 + column * 4);
            total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
        }
    total.x += __shfl_xor_sync(ALL_LANES, total.x, 16);
    total.y += __shfl_xor_sync(ALL_LANES, total.y, 16);
    total.z += __shfl_xor_sync(ALL_LANES, total.z, 16);
    total.w += __shfl_xor_sync(ALL_LANES, total.w, 16);
    const float four = total.x + total.y + total.z + total.w;
    float res = 0.f;
#pragma unroll
    for (int k = 8; k < 12; k++) res += __shfl_sync(ALL_LANES, four, k);
    if (lane < 6) *(float4*)(d_affine + lane * 4) = total;
    if (lane == 6) d_affine[ROWS] = four;
    if (lane == 7) d_affine[ROWS + 1] = four;
    if (lane == 8) d_affine[ROWS + 2] = res;
}

// `rows` warps call it, each after it has stored its row: the last one sums all rows up.
__device__ __forceinline__ void reduce_by_last(u32* done, const float* partial, int rows, float* d_affine,
                                               int lane) {
    u32 before = 0;
    if (lane == 0) {
        __threadfence();
        before = atomicAdd(done, 1u);
        __threadfence();
    }
    if (__shfl_sync(ALL_LANES, before, 0) == rows - 1) reduce(partial, rows, d_affine, lane);
}

// Warp `turn` of MIDDLE, with the tokens that are its slice's.
__device__ __forceinline__ void middle(const Place at, int groups, int T, int turn, int lane,
                                       const float* __restrict__ affine, const float* __restrict__ saved,
                                       const float* __restrict__ writer_saved,
                                       const float* __restrict__ writer_affine,
                                       const float* __restrict__ norm_saved, const Handed handed,
                                       const float* parts, float* staging, const Gradients to) {
    // The warp prepares TOGETHER tokens at once, then awaits their sums one token after the other.
    const int half = TOGETHER == 2 ? lane / 16 : 0, e = lane % 16, i = e / STREAMS, j = e % STREAMS;
    const float gate_early = affine[e < STREAMS ? ROWS : ROWS + 1], gate_res = affine[ROWS + 2];
    const float shift_early = e < 2 * STREAMS ? affine[e] : 0.f, shift_res = affine[2 * STREAMS + e];
    const int transpose = V4 ? j * STREAMS + i : e;  // comb's element e in H_res
    float bias_early = 0.f, bias_res = 0.f, alpha_early = 0.f, alpha_late = 0.f;
    float* coefficient = staging + (TOGETHER * turn + half) * STAGING;
    float *matrix = coefficient + TOKEN_FLOATS, *scales = matrix + 16;  // not under V4
    // Every SLICES-th token of the group is this slice's.
    for (int first = at.slice + TOGETHER * turn * SLICES; first < at.tiles * TILE;
         first += TOGETHER * (MIDDLE + BUG(warp_left_out)) * SLICES) {
        const int own = min(first + half * SLICES, at.tiles * TILE - 1);
        const int t = (at.group + own / TILE * groups) * TILE + own % TILE;
        const float* row = saved + (u64)min(t, T - 1) * 25;
        const float u_early = row[e], u_late = e < 9 ? row[16 + e] : 0.f;
        const float inverse = __shfl_sync(ALL_LANES, u_late, lane / 16 * 16 + 8);
        float kept = 0.f, norm_inverse = 0.f;
        if constexpr (NORM) {
            kept = norm_saved[(u64)min(t, T - 1) * KEPT + min(e, STREAMS)];
            norm_inverse = __shfl_sync(ALL_LANES, kept, lane / 16 * 16 + STREAMS);
        }
        const float res0 = __shfl_sync(ALL_LANES, u_early, lane / 16 * 16 + ((e + 8) & 15));
        const float res1 = __shfl_sync(ALL_LANES, u_late, lane / 16 * 16 + ((e - 8) & 15));
        const float u_res = e < 8 ? res0 : res1;
        const float s = sigmoid(__fmaf_rn(u_early, gate_early, shift_early));
        // Of lanes e < 4: the weights that l was read with, and what those made here get.
        float h_read = s + (V4 ? EPS : 0.f), d_handed_on = 0.f;
        if constexpr (PREVIOUS) {
            const u64 here = (u64)min(t, T - 1) * STREAMS + e % STREAMS;
            h_read = handed.h_pre[here];
            if (handed.d_handed_on) d_handed_on = handed.d_handed_on[here];
        }
        const float z = __fmaf_rn(u_res, gate_res, shift_res);
        __syncwarp();  // the last tokens' coefficients are published
        // V4 keeps the steps; otherwise J is the Jacobian.
        float h, steps[STEPS], K[16], J[16];
        bool wide = false, some_wide = false;
        if constexpr (V4) {
            h = sinkhorn(z, steps);
        } else {
            wide = max_axis<0>(max_axis<1>(z)) + max_axis<0>(max_axis<1>(-z)) > SPREAD;
            matrix[e] = z;
            __syncwarp();
            h = sinkhorn_scaled(matrix, scales, K, e);
            sinkhorn_scaled_jacobian(J, scales, K, e);
            some_wide = __any_sync(ALL_LANES, wide);
            if (some_wide) {
                const float exact = sinkhorn(z, steps);
                h = wide ? exact : h;
            }
        }
        if (e < STREAMS) coefficient[H_PRE_AT + e] = h_read;
        if (DF && e < STREAMS)
            coefficient[H_POST_AT + e] =
                2.f * sigmoid(__fmaf_rn(writer_saved[(u64)min(t, T - 1) * 25 + STREAMS + e],
                                        writer_affine[ROWS + 1], writer_affine[STREAMS + e]));
        coefficient[H_RES_AT + transpose] = h;
#pragma unroll 1
        for (int turned = 0; turned < TOGETHER && first + turned * SLICES < at.tiles * TILE; turned++) {
            const int it = (first + turned * SLICES) / TILE, r = (first + turned * SLICES) % TILE;
            const float* part = parts + (it % EXCHANGE) * SLICES * PART + r * ATOMS * 4;
            if (lane == 0) MARK(it, 3);
            await_slices(part, at.slice, PART, it + 1, lane);
            if (lane == 0) MARK(it, 4);
            const float3 products =  // of atom lane % 8
                sum_quarters(sum_slices<4, LOADS>(part + lane % ATOMS * 4, lane / ATOMS, PART, it + 1));
            const int a = transpose / STREAMS, b = transpose % STREAMS;
            const float b03 = __shfl_sync(ALL_LANES, products.x, 2 * a + b / 3);
            const float b1 = __shfl_sync(ALL_LANES, products.y, 2 * a);
            const float b2 = __shfl_sync(ALL_LANES, products.z, 2 * a);
            const float post = __shfl_sync(ALL_LANES, products.y, 2 * j + 1);
            float read = __shfl_sync(ALL_LANES, products.z, 2 * j + 1);
            if constexpr (NORM) {  // lane e < 4 has h_pre e, <x_e, u> and <x_e, l>
                const float with_u = sum_axis<1>(__fmul_rn(h_read, read));
                const float along = __fmul_rn(norm_inverse * norm_inverse, with_u) / CHANNELS;
                read = norm_inverse * __fmaf_rn(-along, kept, read);
                if (half == turned && e == 0)
                    coefficient[INVERSE_AT] = norm_inverse, coefficient[ALONG_AT] = norm_inverse * along;
            }
            if (PREVIOUS && half == turned && t < T && e < STREAMS)
                handed.d_h_pre[(u64)t * STREAMS + e] = read;
            float d_early = 0.f;
            if (e < STREAMS)
                d_early = (PREVIOUS ? d_handed_on : read) * s * (1.f - s);
            else if (e < 2 * STREAMS)
                d_early = post * 2.f * s * (1.f - s);
            float d_res = b == 1 ? b1 : b == 2 ? b2 : b03;
            if constexpr (V4) {
                d_res = sinkhorn_backward(h, d_res, steps);
            } else {
                const float by_rows = sum_rows(J, d_res, e);
                if (some_wide) {
                    sinkhorn(z, steps);  // again: few tokens need the steps, and all would have to keep them
                    d_res = sinkhorn_backward(h, d_res, steps);
                }
                if (!wide) d_res = by_rows;
            }
            if (half != turned || t >= T) d_res = d_early = 0.f;
            bias_early += d_early, bias_res += d_res;
            alpha_early = __fmaf_rn(d_early, u_early, alpha_early);
            alpha_late = __fmaf_rn(d_res, u_res, alpha_late);
            d_early *= gate_early, d_res *= gate_res;
            const float inner = sum16(__fadd_rn(__fmul_rn(d_res, u_res), __fmul_rn(d_early, u_early)));
            if (half == turned) {
                if (e == 0) coefficient[NORM_AT] = -inner * inverse * inverse / (STREAMS * CHANNELS);
                if (e < 2 * STREAMS) coefficient[D_AT + e] = d_early * inverse;
                coefficient[D_AT + 2 * STREAMS + e] = d_res * inverse;
            }
            __syncwarp();
            if (lane < COEFFICIENT_ATOMS) {
                const float* c = staging + (TOGETHER * turn + turned) * STAGING + 3 * lane;
                put(to.coefficients + (((it % EXCHANGE) * TILE + r) * COEFFICIENT_ATOMS + lane) * 4, c[0],
                    c[1], c[2], it + 1);
            }
            if (lane == 0) MARK(it, 5);
        }
    }
    if (TOGETHER == 2 && !BUG(half_forgotten)) {
        bias_early += __shfl_xor_sync(ALL_LANES, bias_early, 16);
        bias_res += __shfl_xor_sync(ALL_LANES, bias_res, 16);
        alpha_early += __shfl_xor_sync(ALL_LANES, alpha_early, 16);
        alpha_late += __shfl_xor_sync(ALL_LANES, alpha_late, 16);
    }
    float* sums = to.partial + ((at.group * SLICES + at.slice) * MIDDLE + turn) * 48;
    if (BUG(out_of_bounds)) sums += 64;
    if (lane < 2 * STREAMS) sums[lane] = bias_early, sums[24 + lane] = alpha_early;
    if (lane < 16) sums[8 + lane] = bias_res, sums[32 + lane] = alpha_late;
    __syncwarp();
    reduce_by_last(to.done, to.partial, SLICES * groups * MIDDLE, to.d_affine, lane);
}
