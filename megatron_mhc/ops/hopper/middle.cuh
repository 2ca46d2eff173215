// The warps of pre_backward.cu between the products and dx: from the sums of a token over all channels to what dx is made of,
// its coefficients and the gradient of its logits.

#define MIDDLE 3               // such warps
#define ATOMS 8                // of a token: g_i with x_0 to x_2, and g_i with x_3, g_i with f and its bias, dl with x_i
#define PART (BT * ATOMS * 4)  // floats
#define COEFFICIENT_ATOMS 17
#define H_RES 0                // where they are among a token's 51 numbers
#define H_PRE 16
#define WRITER 20              // h_post of the connection that wrote x
#define NORM 24                // s
#define D 26
#define ROW 52                 // floats between two tokens' in shared memory
#define STAGING (ROW + 16 + 8 * ITERATIONS)  // floats of half a middle warp: a token's coefficients, a matrix, scaling vectors

struct Gradients {
  float *d_bias, *d_alphas, *coefficients, *partial;
  u32* done;
};

// Warp `turn` of MIDDLE, with the tokens that are its slice's.
__device__ __forceinline__ void middle(
    const Place at, int groups, int T, int turn, int lane, const float* __restrict__ bias,
    const float* __restrict__ alpha_pre, const float* __restrict__ alpha_post, const float* __restrict__ alpha_res,
    const float* __restrict__ saved, const float* __restrict__ writer_saved, const float* __restrict__ writer_bias,
    const float* __restrict__ writer_alpha, const float* parts, float* staging, const Gradients to) {
  // TOGETHER tokens are prepared, one in each half of a warp; then their sums are awaited, one after the other.
  const int half = TOGETHER == 2 ? lane / 16 : 0, e = lane % 16, i = e / N, j = e % N;
  const float gate_early = e < N ? *alpha_pre : *alpha_post, gate_res = *alpha_res;
  const float shift_early = e < 2 * N ? bias[e] : 0.f, shift_res = bias[2 * N + e];
  const int transpose = V4 ? j * N + i : e;  // where H_res has what comb has at e
  float bias_early = 0.f, bias_res = 0.f, alpha_early = 0.f, alpha_late = 0.f;
  float* coefficient = staging + (TOGETHER * turn + half) * STAGING;
#if !V4
  float *matrix = coefficient + ROW, *past = matrix + 16;
#endif
  // Every G-th token of the group is this slice's.
  for (int first = at.slice + TOGETHER * turn * G; first < at.tiles * BT; first += TOGETHER * MIDDLE * G) {
    const int own = min(first + half * G, at.tiles * BT - 1), t = (at.group + own / BT * groups) * BT + own % BT;
    const float* row = saved + (u64)min(t, T - 1) * 25;
    const float u_early = row[e], u_late = e < 9 ? row[16 + e] : 0.f;
    const float inverse = __shfl_sync(ALL, u_late, lane / 16 * 16 + 8);
    const float res0 = __shfl_sync(ALL, u_early, lane / 16 * 16 + ((e + 8) & 15));
    const float res1 = __shfl_sync(ALL, u_late, lane / 16 * 16 + ((e - 8) & 15));
    const float u_res = e < 8 ? res0 : res1;
    const float s = sigmoid(__fmaf_rn(u_early, gate_early, shift_early));
    const float z = __fmaf_rn(u_res, gate_res, shift_res);
    __syncwarp();  // the last tokens' coefficients have left `coefficient`
#if V4
    float past[STEPS];
    const float h = sinkhorn(z, past);
#else
    float K[16], J[16];
    const bool wide = max_axis<0>(max_axis<1>(z)) + max_axis<0>(max_axis<1>(-z)) > SPREAD;
    matrix[e] = z;
    __syncwarp();
    float h = sinkhorn_scaled(matrix, past, K, e);
    sinkhorn_scaled_jacobian(J, past, K, e);
    const bool some_wide = __any_sync(ALL, wide);
    if (some_wide) {
      float steps[STEPS];
      const float exact = sinkhorn(z, steps);
      h = wide ? exact : h;
    }
#endif
    if (e < N) coefficient[H_PRE + e] = s + (V4 ? EPS : 0.f);
#if DF
    if (e < N)
      coefficient[WRITER + e] = 2.f * sigmoid(
          __fmaf_rn(writer_saved[(u64)min(t, T - 1) * 25 + N + e], *writer_alpha, writer_bias[N + e]));
#endif
    coefficient[H_RES + transpose] = h;
#pragma unroll 1
    for (int turned = 0; turned < TOGETHER && first + turned * G < at.tiles * BT; turned++) {
      const int it = (first + turned * G) / BT, r = (first + turned * G) % BT;
      const float* part = parts + (it % EXCHANGE) * G * PART + r * ATOMS * 4;
      if (lane == 0) MARK(it, 3);
      await_slices(part, at.slice, PART, it + 1, lane);
      if (lane == 0) MARK(it, 4);
      const float3 products =  // of atom lane % 8
          sum_quarters(sum_slices<4, LOADS>(part + lane % ATOMS * 4, lane / ATOMS, PART, it + 1));
      const int a = transpose / N, b = transpose % N;
      const float b03 = __shfl_sync(ALL, products.x, 2 * a + b / 3), b1 = __shfl_sync(ALL, products.y, 2 * a);
      const float b2 = __shfl_sync(ALL, products.z, 2 * a);
      const float post = __shfl_sync(ALL, products.y, 2 * j + 1), read = __shfl_sync(ALL, products.z, 2 * j + 1);
      float d_early = 0.f;
      if (e < N) d_early = read * s * (1.f - s);
      else if (e < 2 * N) d_early = post * 2.f * s * (1.f - s);
      float d_res = b == 1 ? b1 : b == 2 ? b2 : b03;
#if V4
      d_res = sinkhorn_backward(h, d_res, past);
#else
      const float by_rows = sum_rows(J, d_res, e);
      if (some_wide) {
        float steps[STEPS];
        sinkhorn(z, steps);  // once more, since few tokens need it and all would have to hold it
        d_res = sinkhorn_backward(h, d_res, steps);
      }
      if (!wide) d_res = by_rows;
#endif
      if (half != turned || t >= T) d_res = d_early = 0.f;
      bias_early += d_early, bias_res += d_res;
      alpha_early = __fmaf_rn(d_early, u_early, alpha_early);
      alpha_late = __fmaf_rn(d_res, u_res, alpha_late);
      d_early *= gate_early, d_res *= gate_res;
      const float inner = sum16(__fadd_rn(__fmul_rn(d_res, u_res), __fmul_rn(d_early, u_early)));
      if (half == turned) {
        if (e == 0) coefficient[NORM] = -inner * inverse * inverse / (N * C);
        if (e < 2 * N) coefficient[D + e] = d_early * inverse;
        coefficient[D + 2 * N + e] = d_res * inverse;
      }
      __syncwarp();
      if (lane < COEFFICIENT_ATOMS) {
        const float* c = staging + (TOGETHER * turn + turned) * STAGING + 3 * lane;
        put(to.coefficients + (((it % EXCHANGE) * BT + r) * COEFFICIENT_ATOMS + lane) * 4, c[0], c[1], c[2], it + 1);
      }
      if (lane == 0) MARK(it, 5);
    }
  }
  if (TOGETHER == 2) {
    bias_early += __shfl_xor_sync(ALL, bias_early, 16), bias_res += __shfl_xor_sync(ALL, bias_res, 16);
    alpha_early += __shfl_xor_sync(ALL, alpha_early, 16), alpha_late += __shfl_xor_sync(ALL, alpha_late, 16);
  }
  float* sums = to.partial + ((at.group * G + at.slice) * MIDDLE + turn) * 48;
  if (lane < 2 * N) sums[lane] = bias_early, sums[24 + lane] = alpha_early;
  if (lane < 16) sums[8 + lane] = bias_res, sums[32 + lane] = alpha_late;
  __syncwarp();
  reduce_by_last(to.done, to.partial, G * groups * MIDDLE, to.d_bias, to.d_alphas, lane);
}
