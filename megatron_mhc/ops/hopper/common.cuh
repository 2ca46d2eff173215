// What the two kernels share: n = 4 streams of C channels, bf16. Compiled by NVRTC without any header but
// device.cuh, which stands before it.
//
// A group of G thread blocks works through tiles of BT tokens, 8 or 16; block `slice` of it owns CW channels of all
// four streams. It loads them into shared memory once and keeps them there while the group sums up, through
// global memory, what needs whole rows. Waiting is safe: blocks take tickets as they start, a group is G
// tickets in a row, and a block waits for blocks of its own or an earlier group alone. So the kernel ends
// wherever G blocks can be resident together, whatever else the GPU runs.

#define N 4
#define M 24
#define G ((C + CW - 1) / CW)  // blocks of a group, slices of a row
#define EXCHANGE (2 * STAGES)  // slots of the rings in global memory, see `pre.cu`

// Where a copy has put 8 channels from `chunk` * 8 on of a row: the hardware exchanges the sixteen bytes of a row by
// bits 7 to 9 of its address, so that eight rows below each other lie in different banks.
__device__ __forceinline__ u32 place(u32 row, u32 chunk) {
  row += chunk / 8 * BOX_BYTES;
  return row + ((chunk % 8 ^ row >> 7 & 7) << 4);
}

// ---- exchange through global memory ----
//
// By atoms of three numbers and a tag: a reader repeats its load until it finds the tag of its tile. Memory starts
// as zeros, tags at 1.

// Until all slices have put the atom at p + s * stride, `first` to begin with: for most of the time one sector a warp is asked
// for. The rest of a tile comes at about the same time, and whoever reads it looks at its tags.
__device__ __forceinline__ void await_slices(const float* p, int first, int stride, u32 tag, int lane) {
  while (get(p + first * stride).tag != tag) {}
  for (int s = lane; s < G; s += 32)
    while (get(p + s * stride).tag != tag) {}
  __syncwarp();
}
// K atoms at p + offset, once all have the tag; the loads depend on nothing, so that none waits for another.
template <int K>
__device__ __forceinline__ void get_all(Tagged (&v)[K], const float* p, const int (&offset)[K], u32 tag) {
  bool missing;
  do {
#pragma unroll
    for (int k = 0; k < K; k++) v[k] = get(p + offset[k]);
    missing = false;
#pragma unroll
    for (int k = 0; k < K; k++) missing |= v[k].tag != tag;
  } while (missing);
}
// The sum over slices first, first + STEP, ..., in this order. MANY at once, each at a distance from the first that is known to the compiler: past the last slice they find what other
// slots have, or the zeros behind them (AHEAD in compile.py), which is left alone.
template <int STEP, int MANY>
__device__ __forceinline__ float3 sum_slices(const float* p, int first, int stride, u32 tag) {
  float3 total = make_float3(0.f, 0.f, 0.f);
#pragma unroll 1
  for (int s = first; s < G; s += STEP * MANY) {
    Tagged v[MANY];
    bool missing;
    do {
      missing = false;
#pragma unroll
      for (int k = 0; k < MANY; k++) v[k] = get(p + s * stride + k * STEP * stride);
#pragma unroll
      for (int k = 0; k < MANY; k++) missing |= s + k * STEP < G && v[k].tag != tag;
    } while (missing);
#pragma unroll
    for (int k = 0; k < MANY; k++)
      if (s + k * STEP < G) total.x += v[k].x, total.y += v[k].y, total.z += v[k].z;
  }
  return total;
}
__device__ __forceinline__ float3 add(float3 a, float3 b) { return make_float3(a.x + b.x, a.y + b.y, a.z + b.z); }
// even + odd of the lanes that hold them: the same bits in every lane.
__device__ __forceinline__ float3 add_lanes(float3 v, int even, int odd) {
  return make_float3(__shfl_sync(0xffffffffu, v.x, even) + __shfl_sync(0xffffffffu, v.x, odd),
                     __shfl_sync(0xffffffffu, v.y, even) + __shfl_sync(0xffffffffu, v.y, odd),
                     __shfl_sync(0xffffffffu, v.z, even) + __shfl_sync(0xffffffffu, v.z, odd));
}
// Of lanes 8 apart: the same bits in all of them.
__device__ __forceinline__ float3 sum_quarters(float3 v) {
#pragma unroll
  for (int step = 8; step < 32; step *= 2)
    v = add(v, make_float3(__shfl_xor_sync(0xffffffffu, v.x, step), __shfl_xor_sync(0xffffffffu, v.y, step),
                           __shfl_xor_sync(0xffffffffu, v.z, step)));
  return v;
}
// Number k of those that lanes hold three by three, 3 lane to 3 lane + 2.
__device__ __forceinline__ float pick(float3 v, int k) {
  const float x = __shfl_sync(0xffffffffu, v.x, k / 3), y = __shfl_sync(0xffffffffu, v.y, k / 3);
  const float z = __shfl_sync(0xffffffffu, v.z, k / 3);
  return k % 3 == 0 ? x : k % 3 == 1 ? y : z;
}

// ---- coefficients ----

__device__ __forceinline__ float sigmoid(float x) { return divide(1.f, 1.f + exp_fast(-x)); }

// Sums and maxima over the rows (j) or columns (i) of 4 x 4 matrices, element 4 i + j in lane 4 i + j of 16.
#define ALL 0xffffffffu
template <int AXIS>  // 0: over i, 1: over j
__device__ __forceinline__ float sum_axis(float v) {
  const int step = AXIS == 0 ? 4 : 1;
  v += __shfl_xor_sync(ALL, v, step);
  return v + __shfl_xor_sync(ALL, v, 2 * step);
}
template <int AXIS>
__device__ __forceinline__ float max_axis(float v) {
  const int step = AXIS == 0 ? 4 : 1;
  v = fmaxf(v, __shfl_xor_sync(ALL, v, step));
  return fmaxf(v, __shfl_xor_sync(ALL, v, 2 * step));
}
template <int AXIS>
__device__ __forceinline__ float log_normalised(float z) {
  z -= max_axis<AXIS>(z);
  return z - __logf(sum_axis<AXIS>(exp_fast(z)));
}
__device__ __forceinline__ float sum16(float v) { return sum_axis<0>(sum_axis<1>(v)); }

#define EPS 1e-6f
#define STEPS (2 * ITERATIONS)  // columns and rows in turn; under V4 softmax, columns, then rows and columns in turn

// Where the logits of a token lie within 30 of each other, Sinkhorn goes by sums and divisions: the same numbers as
// in the log domain, which the rest take, in half the time.
#define SPREAD 30.f

// H_res (under V4 comb) of one logit a lane; past[k] is the matrix behind step k (V4: before it).
// Source: arXiv 2512.24880 Eq. (9); reference.sinkhorn, reference.sinkhorn_deepseek_v4.
__device__ __forceinline__ float sinkhorn(float z, float (&past)[STEPS]) {
#if V4
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
#else
  const float top = max_axis<0>(max_axis<1>(z));
  if (!__any_sync(ALL, top - z > SPREAD)) {
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
#endif
}

// The same of a row a lane, four lanes a matrix, where nothing past is wanted.
__device__ __forceinline__ void normalise_row(float (&m)[N], float eps) {
  const float scale = quotient(1.f, m[0] + m[1] + (m[2] + m[3]) + eps);
#pragma unroll
  for (int j = 0; j < N; j++) m[j] *= scale;
}
__device__ __forceinline__ void normalise_columns(float (&m)[N], float eps) {
  float total[N];
#pragma unroll
  for (int j = 0; j < N; j++) total[j] = sum_axis<1>(m[j]);  // over the four lanes
#pragma unroll
  for (int j = 0; j < N; j++) m[j] = quotient(m[j], total[j] + eps);
}
__device__ __forceinline__ void log_normalise_row(float (&z)[N]) {
  const float top = fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3]));
  float total = 0.f;
#pragma unroll
  for (int j = 0; j < N; j++) z[j] -= top, total += exp_fast(z[j]);
#pragma unroll
  for (int j = 0; j < N; j++) z[j] -= __logf(total);
}
__device__ __forceinline__ void sinkhorn_rows(float (&z)[N]) {
  const float top = fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3])), all = max_axis<1>(top);
  bool wide = false;
#pragma unroll
  for (int j = 0; j < N; j++) wide |= all - z[j] > SPREAD;
#if V4
#pragma unroll
  for (int j = 0; j < N; j++) z[j] = exp_fast(z[j] - top);
  normalise_row(z, 0.f);
#pragma unroll
  for (int j = 0; j < N; j++) z[j] += EPS;
  normalise_columns(z, EPS);
  for (int k = 1; k < ITERATIONS; k++) normalise_row(z, EPS), normalise_columns(z, EPS);
#else
  wide = max_axis<1>(wide) > 0.f;  // of the token, whose bits must not depend on the others'
  float m[N];
#pragma unroll
  for (int j = 0; j < N; j++) m[j] = exp_fast(z[j] - all);
  for (int k = 0; k < ITERATIONS; k++) normalise_columns(m, 0.f), normalise_row(m, 0.f);
  if (__any_sync(ALL, wide))
    for (int k = 0; k < ITERATIONS; k++) {
#pragma unroll
      for (int j = 0; j < N; j++) z[j] = log_normalised<1>(z[j]);  // over the four lanes: a column
      log_normalise_row(z);
    }
#pragma unroll
  for (int j = 0; j < N; j++) z[j] = wide ? exp_fast(z[j]) : m[j];
#endif
}

// A whole 4 x 4 matrix in each of 16 lanes, by scaling vectors, since shuffles between lanes would be most of the time:
// after t steps M = u_t K v_t with K = exp(z), v_t = 1 / (K^T u_{t-1}), u_t = 1 / (K v_t), u_0 = 1.
// past: [ITERATIONS, 8] in shared memory, v_t and u_t. Returns element `e` of M.
__device__ __forceinline__ float sinkhorn_scaled(const float* z, float* past, float (&K)[16], int e) {
  float top = z[0], u[N] = {1.f, 1.f, 1.f, 1.f}, v[N], mine = 0.f;
#pragma unroll
  for (int k = 0; k < 16; k++) K[k] = z[k], top = fmaxf(top, K[k]);
#pragma unroll
  for (int k = 0; k < 16; k++) K[k] = exp_fast(K[k] - top);
#pragma unroll 1
  for (int t = 0; t < ITERATIONS; t++) {
#pragma unroll
    for (int j = 0; j < N; j++)
      v[j] = quotient(1.f, K[j] * u[0] + K[N + j] * u[1] + (K[2 * N + j] * u[2] + K[3 * N + j] * u[3]));
#pragma unroll
    for (int i = 0; i < N; i++)
      u[i] = quotient(1.f, K[N * i] * v[0] + K[N * i + 1] * v[1] + (K[N * i + 2] * v[2] + K[N * i + 3] * v[3]));
    if (e == 0) {
      *(float4*)(past + 8 * t) = make_float4(v[0], v[1], v[2], v[3]);
      *(float4*)(past + 8 * t + N) = make_float4(u[0], u[1], u[2], u[3]);
    }
  }
#pragma unroll
  for (int k = 0; k < 16; k++) mine = e == k ? u[k / N] * K[k] * v[k % N] : mine;
  __syncwarp();
  return mine;
}
// Row e of what takes the gradient of H_res to that of the logits, exact for the truncated iterations: the gradient that
// is 1 at e, taken back. It asks for no gradient, so it is made while those are awaited.
__device__ __forceinline__ void sinkhorn_scaled_jacobian(float (&J)[16], const float* past, const float (&K)[16], int e) {
  float du[N] = {}, dv[N] = {};
  float4 v4 = *(const float4*)(past + 8 * (ITERATIONS - 1)), u4 = *(const float4*)(past + 8 * (ITERATIONS - 1) + N);
  {
    const float u[N] = {u4.x, u4.y, u4.z, u4.w}, v[N] = {v4.x, v4.y, v4.z, v4.w};
#pragma unroll
    for (int k = 0; k < 16; k++) {
      J[k] = k == e ? u[k / N] * v[k % N] : 0.f;
      du[k / N] += k == e ? K[k] * v[k % N] : 0.f;
      dv[k % N] += k == e ? u[k / N] * K[k] : 0.f;
    }
  }
#pragma unroll 1
  for (int t = ITERATIONS - 1; t >= 0; t--) {
    const float4 before = t ? *(const float4*)(past + 8 * t - N) : make_float4(1.f, 1.f, 1.f, 1.f);
    const float u[N] = {u4.x, u4.y, u4.z, u4.w}, v[N] = {v4.x, v4.y, v4.z, v4.w};
    const float w[N] = {before.x, before.y, before.z, before.w};
    float a[N], b[N];
#pragma unroll
    for (int i = 0; i < N; i++) a[i] = -u[i] * du[i] * u[i];
#pragma unroll
    for (int j = 0; j < N; j++) {
      dv[j] += K[j] * a[0] + K[N + j] * a[1] + (K[2 * N + j] * a[2] + K[3 * N + j] * a[3]);
      b[j] = -v[j] * dv[j] * v[j];
      dv[j] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < N; i++)
      du[i] = K[N * i] * b[0] + K[N * i + 1] * b[1] + (K[N * i + 2] * b[2] + K[N * i + 3] * b[3]);
#pragma unroll
    for (int k = 0; k < 16; k++) J[k] += a[k / N] * v[k % N] + w[k / N] * b[k % N];
    u4 = before;
    if (t) v4 = *(const float4*)(past + 8 * t - 8);
  }
#pragma unroll
  for (int k = 0; k < 16; k++) J[k] *= K[k];
}
// Of 2 HALF numbers a lane keeps the half that bit HALF of e names, plus what the lane across from it sends of that.
template <int HALF>
__device__ __forceinline__ void exchange_halves(float (&p)[16], int e) {
#pragma unroll
  for (int k = 0; k < HALF; k++) {
    const float kept = e & HALF ? p[k + HALF] : p[k], sent = e & HALF ? p[k] : p[k + HALF];
    p[k] = kept + __shfl_xor_sync(ALL, sent, HALF);
  }
}
// Number e, in lane e of 16, of the sum over lanes of d J, J a row a lane.
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

// The gradient of the logits from that of the matrix, exact for the truncated iterations.
__device__ __forceinline__ float sinkhorn_backward(float m, float dm, const float (&past)[STEPS]) {
#if V4
#pragma unroll
  for (int k = STEPS - 1; k > 0; k--) {
    float p = past[k], total = (k % 2 ? sum_axis<0>(p) : sum_axis<1>(p)) + EPS;
    float mean = quotient(k % 2 ? sum_axis<0>(__fmul_rn(dm, p)) : sum_axis<1>(__fmul_rn(dm, p)), total);
    dm = quotient(dm - mean, total);
  }
  float p = past[0];
  return p * (dm - sum_axis<1>(__fmul_rn(dm, p)));
#else
  float dz = dm * m;
#pragma unroll
  for (int k = STEPS - 1; k >= 0; k--) dz -= past[k] * (k % 2 ? sum_axis<1>(dz) : sum_axis<0>(dz));
  return dz;
#endif
}

// d_bias and d_alphas from every middle warp's sums; 48 columns: biases, then alphas' terms in their order.
__device__ void reduce(const float* partial, int rows, float* d_bias, float* d_alphas, int lane) {
  const int half = lane / 16, column = lane % 16;
  float4 total = make_float4(0, 0, 0, 0);
  if (column < 12)
#pragma unroll 16
    for (int r = half; r < rows; r += 2) {
      const float4 v = load_fresh4(partial + r * 48 + column * 4);
      total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
    }
  total.x += __shfl_xor_sync(ALL, total.x, 16);
  total.y += __shfl_xor_sync(ALL, total.y, 16);
  total.z += __shfl_xor_sync(ALL, total.z, 16);
  total.w += __shfl_xor_sync(ALL, total.w, 16);
  const float four = total.x + total.y + total.z + total.w;
  float res = 0.f;
#pragma unroll
  for (int k = 8; k < 12; k++) res += __shfl_sync(ALL, four, k);
  if (lane < 6) *(float4*)(d_bias + lane * 4) = total;
  if (lane == 6) d_alphas[0] = four;
  if (lane == 7) d_alphas[1] = four;
  if (lane == 8) d_alphas[2] = res;
}

// Called by `rows` warps, each behind its row: the last one to come adds all of them up.
__device__ __forceinline__ void reduce_by_last(u32* done, const float* partial, int rows, float* d_bias, float* d_alphas, int lane) {
  u32 before = 0;
  if (lane == 0) {
    __threadfence();
    before = atomicAdd(done, 1u);
    __threadfence();
  }
  if (__shfl_sync(ALL, before, 0) == rows - 1) reduce(partial, rows, d_bias, d_alphas, lane);
}

// ---- who does what ----

struct Place {
  int group, slice, first_channel, width, tiles;  // tiles: how many this group has
};

// Takes a ticket; called by all threads of a block.
__device__ __forceinline__ Place take_place(u32* tickets, int T, int groups) {
  __shared__ u32 ticket;
  if (threadIdx.x == 0) ticket = atomicAdd(tickets, 1u);
  __syncthreads();
  Place p;
  p.group = ticket / G;
  p.slice = ticket % G;
  p.first_channel = p.slice * CW;
  p.width = min(CW, C - p.first_channel);
  p.tiles = ((T + BT - 1) / BT - p.group + groups - 1) / groups;
  return p;
}
// The first token of the group's tile `it` whose coefficients are this slice's to compute; then every G-th.
__device__ __forceinline__ int own_token(const Place& p, int it) {
  int r = (p.slice - (BT * it) % G) % G;
  return r < 0 ? r + G : r;
}
