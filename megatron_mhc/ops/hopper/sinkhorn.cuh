// The coefficients of a token from their logits, and the gradients back.
#pragma once

#include "device.cuh"
#include "shape.cuh"

constexpr int ITERATIONS = MHC_ITERATIONS;
constexpr bool V4 = MHC_V4;  // DeepSeek V4's comb, which is H_res transposed
constexpr float EPS = 1e-6f;
constexpr int STEPS =
    2 * ITERATIONS;  // columns and rows in turn; V4: softmax, columns, then rows and columns in turn

// Where a token's logits lie within SPREAD of each other, Sinkhorn takes sums and divisions: the same numbers
// as in the log domain, in half the time. Other tokens take the log domain.
constexpr float SPREAD = 30.f;

__device__ __forceinline__ float sigmoid(float x) { return divide(1.f, 1.f + exp_fast(-x)); }

// Sums and maxima over the rows (j) or columns (i) of 4 x 4 matrices. Lane 4 i + j of 16 holds element 4 i +
// j.
template <int AXIS>  // 0: over i, 1: over j
__device__ __forceinline__ float sum_axis(float v) {
    const int step = AXIS == 0 ? 4 : 1;
    v += __shfl_xor_sync(ALL_LANES, v, step);
    return v + __shfl_xor_sync(ALL_LANES, v, 2 * step);
}
template <int AXIS>
__device__ __forceinline__ float max_axis(float v) {
    const int step = AXIS == 0 ? 4 : 1;
    v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, step));
    return fmaxf(v, __shfl_xor_sync(ALL_LANES, v, 2 * step));
}
template <int AXIS>
__device__ __forceinline__ float log_normalised(float z) {
    z -= max_axis<AXIS>(z);
    return z - __logf(sum_axis<AXIS>(exp_fast(z)));
}
__device__ __forceinline__ float sum16(float v) { return sum_axis<0>(sum_axis<1>(v)); }

// ---- one logit a lane ----

// Returns H_res, or V4's comb. past[k] is the matrix after step k (V4: before it).
// Source: arXiv 2512.24880 Eq. (9); reference.sinkhorn, reference.sinkhorn_deepseek_v4.
__device__ __forceinline__ float sinkhorn(float z, float (&past)[STEPS]) {
    if constexpr (V4) {
        float m = exp_fast(z - max_axis<1>(z));
        m = quotient(m, sum_axis<1>(m));
        past[0] = m;
        m += EPS;
#pragma unroll
        for (int k = 1; k < STEPS; k++) {
            past[k] = m;
            m = quotient(m, (k % 2 ? sum_axis<0>(m) : sum_axis<1>(m)) + EPS);
        }
        return m;
    } else {
        const float top = max_axis<0>(max_axis<1>(z));
        if (!__any_sync(ALL_LANES, top - z > SPREAD)) {
            float m = exp_fast(z - top);
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                m = quotient(m, k % 2 ? sum_axis<1>(m) : sum_axis<0>(m));
                past[k] = m;
            }
            return m;
        }
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            z = k % 2 ? log_normalised<1>(z) : log_normalised<0>(z);
            past[k] = exp_fast(z);
        }
        return exp_fast(z);
    }
}
// The gradient of the logits from that of the matrix, exact for the truncated iterations.
__device__ __forceinline__ float sinkhorn_backward(float m, float dm, const float (&past)[STEPS]) {
    if constexpr (V4) {
#pragma unroll
        for (int k = STEPS - 1; k > 0; k--) {
            float p = past[k], total = (k % 2 ? sum_axis<0>(p) : sum_axis<1>(p)) + EPS;
            float mean =
                quotient(k % 2 ? sum_axis<0>(__fmul_rn(dm, p)) : sum_axis<1>(__fmul_rn(dm, p)), total);
            dm = quotient(dm - mean, total);
        }
        float p = past[0];
        return p * (dm - sum_axis<1>(__fmul_rn(dm, p)));
    } else {
        float dz = dm * m;
#pragma unroll
        for (int k = STEPS - 1; k >= 0; k--) dz -= past[k] * (k % 2 ? sum_axis<1>(dz) : sum_axis<0>(dz));
        return dz;
    }
}

// ---- one row a lane, four lanes a matrix; keeps no steps ----

__device__ __forceinline__ void normalise_row(float (&m)[STREAMS], float eps) {
    const float scale = quotient(1.f, m[0] + m[1] + (m[2] + m[3]) + eps);
#pragma unroll
    for (int j = 0; j < STREAMS; j++) m[j] *= scale;
}
__device__ __forceinline__ void normalise_columns(float (&m)[STREAMS], float eps) {
    float total[STREAMS];
#pragma unroll
    for (int j = 0; j < STREAMS; j++) total[j] = sum_axis<1>(m[j]);  // over the four lanes
#pragma unroll
    for (int j = 0; j < STREAMS; j++) m[j] = quotient(m[j], total[j] + eps);
}
__device__ __forceinline__ void log_normalise_row(float (&z)[STREAMS]) {
    const float top = fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3]));
    float total = 0.f;
#pragma unroll
    for (int j = 0; j < STREAMS; j++) z[j] -= top, total += exp_fast(z[j]);
#pragma unroll
    for (int j = 0; j < STREAMS; j++) z[j] -= __logf(total);
}
__device__ __forceinline__ void sinkhorn_rows(float (&z)[STREAMS]) {
    const float top = fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3])), all = max_axis<1>(top);
    bool wide = false;
#pragma unroll
    for (int j = 0; j < STREAMS; j++) wide |= all - z[j] > SPREAD;
    if constexpr (V4) {
#pragma unroll
        for (int j = 0; j < STREAMS; j++) z[j] = exp_fast(z[j] - top);
        normalise_row(z, 0.f);
#pragma unroll
        for (int j = 0; j < STREAMS; j++) z[j] += EPS;
        normalise_columns(z, EPS);
        for (int k = 1; k < ITERATIONS; k++) normalise_row(z, EPS), normalise_columns(z, EPS);
    } else {
        wide = max_axis<1>(wide) > 0.f;  // of the token, whose bits must not depend on the others'
        float m[STREAMS];
#pragma unroll
        for (int j = 0; j < STREAMS; j++) m[j] = exp_fast(z[j] - all);
        for (int k = 0; k < ITERATIONS; k++) normalise_columns(m, 0.f), normalise_row(m, 0.f);
        if (__any_sync(ALL_LANES, wide))
            for (int k = 0; k < ITERATIONS; k++) {
#pragma unroll
                for (int j = 0; j < STREAMS; j++)
                    z[j] = log_normalised<1>(z[j]);  // over the four lanes: a column
                log_normalise_row(z);
            }
#pragma unroll
        for (int j = 0; j < STREAMS; j++) z[j] = wide ? exp_fast(z[j]) : m[j];
    }
}

// ---- one matrix in each of 16 lanes ----

// Sinkhorn by scaling vectors, because shuffles between lanes would take most of the time: after t steps
// M = u_t K v_t with K = exp(z), v_t = 1 / (K^T u_{t-1}), u_t = 1 / (K v_t), u_0 = 1.
// past: [ITERATIONS, 8] in shared memory, v_t and u_t. Returns element `e` of M.
__device__ __forceinline__ float sinkhorn_scaled(const float* z, float* past, float (&K)[16], int e) {
    float top = z[0], u[STREAMS] = {1.f, 1.f, 1.f, 1.f}, v[STREAMS], mine = 0.f;
#pragma unroll
    for (int k = 0; k < 16; k++) K[k] = z[k], top = fmaxf(top, K[k]);
#pragma unroll
    for (int k = 0; k < 16; k++) K[k] = exp_fast(K[k] - top);
#pragma unroll 1
    for (int t = 0; t < ITERATIONS; t++) {
#pragma unroll
        for (int j = 0; j < STREAMS; j++)
            v[j] = quotient(1.f, K[j] * u[0] + K[STREAMS + j] * u[1] +
                                     (K[2 * STREAMS + j] * u[2] + K[3 * STREAMS + j] * u[3]));
#pragma unroll
        for (int i = 0; i < STREAMS; i++)
            u[i] = quotient(1.f, K[STREAMS * i] * v[0] + K[STREAMS * i + 1] * v[1] +
                                     (K[STREAMS * i + 2] * v[2] + K[STREAMS * i + 3] * v[3]));
        if (e == 0) {
            *(float4*)(past + 8 * t) = make_float4(v[0], v[1], v[2], v[3]);
            *(float4*)(past + 8 * t + STREAMS) = make_float4(u[0], u[1], u[2], u[3]);
        }
    }
#pragma unroll
    for (int k = 0; k < 16; k++) mine = e == k ? u[k / STREAMS] * K[k] * v[k % STREAMS] : mine;
    __syncwarp();
    return mine;
}
// Row e of the matrix that takes the gradient of H_res to that of the logits, exact for the truncated
// iterations. It is the gradient that is 1 at e, taken back. It needs no gradient, so it is computed while
// gradients are awaited.
__device__ __forceinline__ void sinkhorn_scaled_jacobian(float (&J)[16], const float* past,
                                                         const float (&K)[16], int e) {
    float du[STREAMS] = {}, dv[STREAMS] = {};
    float4 v4 = *(const float4*)(past + 8 * (ITERATIONS - 1));
    float4 u4 = *(const float4*)(past + 8 * (ITERATIONS - 1) + STREAMS);
    {
        const float u[STREAMS] = {u4.x, u4.y, u4.z, u4.w}, v[STREAMS] = {v4.x, v4.y, v4.z, v4.w};
#pragma unroll
        for (int k = 0; k < 16; k++) {
            J[k] = k == e ? u[k / STREAMS] * v[k % STREAMS] : 0.f;
            du[k / STREAMS] += k == e ? K[k] * v[k % STREAMS] : 0.f;
            dv[k % STREAMS] += k == e ? u[k / STREAMS] * K[k] : 0.f;
        }
    }
#pragma unroll 1
    for (int t = ITERATIONS - 1; t >= 0; t--) {
        const float4 before = t ? *(const float4*)(past + 8 * t - STREAMS) : make_float4(1.f, 1.f, 1.f, 1.f);
        const float u[STREAMS] = {u4.x, u4.y, u4.z, u4.w}, v[STREAMS] = {v4.x, v4.y, v4.z, v4.w};
        const float w[STREAMS] = {before.x, before.y, before.z, before.w};
        float a[STREAMS], b[STREAMS];
#pragma unroll
        for (int i = 0; i < STREAMS; i++) a[i] = -u[i] * du[i] * u[i];
#pragma unroll
        for (int j = 0; j < STREAMS; j++) {
            dv[j] +=
                K[j] * a[0] + K[STREAMS + j] * a[1] + (K[2 * STREAMS + j] * a[2] + K[3 * STREAMS + j] * a[3]);
            b[j] = -v[j] * dv[j] * v[j];
            dv[j] = 0.f;
        }
#pragma unroll
        for (int i = 0; i < STREAMS; i++)
            du[i] = K[STREAMS * i] * b[0] + K[STREAMS * i + 1] * b[1] +
                    (K[STREAMS * i + 2] * b[2] + K[STREAMS * i + 3] * b[3]);
#pragma unroll
        for (int k = 0; k < 16; k++)
            J[k] += a[k / STREAMS] * v[k % STREAMS] + w[k / STREAMS] * b[k % STREAMS];
        u4 = before;
        if (t) v4 = *(const float4*)(past + 8 * t - 8);
    }
#pragma unroll
    for (int k = 0; k < 16; k++) J[k] *= K[k];
}
// Of 2 HALF numbers a lane keeps the half that bit HALF of e names, and adds what the lane across sends of
// that half.
template <int HALF>
__device__ __forceinline__ void exchange_halves(float (&p)[16], int e) {
#pragma unroll
    for (int k = 0; k < HALF; k++) {
        const float kept = e & HALF ? p[k + HALF] : p[k], sent = e & HALF ? p[k] : p[k + HALF];
        p[k] = kept + __shfl_xor_sync(ALL_LANES, sent, HALF);
    }
}
// Lane e of 16 gets number e of the sum over lanes of d J, where each lane has a row of J.
__device__ __forceinline__ float sum_rows(const float (&J)[16], float d, int e) {
    float p[16];
#pragma unroll
    for (int k = 0; k < 16; k++) p[k] = __fmul_rn(d, J[k]);
    exchange_halves<8>(p, e);
    exchange_halves<4>(p, e);
    exchange_halves<2>(p, e);
    exchange_halves<1>(p, e);
    return p[0];
}
