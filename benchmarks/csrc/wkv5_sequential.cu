// WKV-5 the plain way, to measure rwkv_dpo.wkv.cuda against: one block per (sequence, head), one thread per channel, one token
// after the other. Head sizes up to 64 stay in registers; larger ones spill.
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Mirrors `Layout` in wkv5_sequential.py. In no anonymous namespace, as in wkv5_cuda.cu.
struct Layout {
    int dtype, n_sequences, n_heads, head_size;
    const int* cu_seqlens;  // [n_sequences + 1]
    const float *w, *u;     // [H, N]
    cudaStream_t stream;
};

namespace {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void from_float(float& to, float x) { to = x; }
__device__ inline void from_float(__half& to, float x) { to = __float2half(x); }
__device__ inline void from_float(__nv_bfloat16& to, float x) { to = __float2bfloat16(x); }

// Thread c holds column c of the state; beyond the head size it only keeps the barriers company.
template <class T, int NP>
__global__ void __launch_bounds__(NP)
sequential_forward(Layout layout, const T* __restrict__ r, const T* __restrict__ k, const T* __restrict__ v, const float* state0,
                   T* y, float* state_end) {
    __shared__ float r_t[NP], k_t[NP], u[NP], w[NP];
    const int c = threadIdx.x, n = layout.head_size, head = blockIdx.y;
    const int64_t stride = int64_t(layout.n_heads) * n, square = (int64_t(blockIdx.x) * layout.n_heads + head) * n * n;
    const bool inside = c < n;
    w[c] = inside ? layout.w[head * n + c] : 0.f;
    u[c] = inside ? layout.u[head * n + c] : 0.f;
    float state[NP];
#pragma unroll
    for (int i = 0; i < NP; ++i) state[i] = state0 != nullptr && inside && i < n ? state0[square + i * n + c] : 0.f;
    for (int t = layout.cu_seqlens[blockIdx.x]; t < layout.cu_seqlens[blockIdx.x + 1]; ++t) {
        const int64_t at = t * stride + head * n + c;
        __syncthreads();
        r_t[c] = inside ? to_float(r[at]) : 0.f;
        k_t[c] = inside ? to_float(k[at]) : 0.f;
        const float v_c = inside ? to_float(v[at]) : 0.f;
        __syncthreads();
        float y_c = 0;
#pragma unroll
        for (int i = 0; i < NP; ++i) {
            const float kv = k_t[i] * v_c;
            y_c += r_t[i] * (state[i] + u[i] * kv);
            state[i] = w[i] * state[i] + kv;
        }
        if (inside) from_float(y[at], y_c);
    }
#pragma unroll
    for (int i = 0; i < NP; ++i)
        if (inside && i < n) state_end[square + i * n + c] = state[i];
}

// Forward in time: thread c holds row c of the state and of its derivative by w; gradients of r, w and u.
template <class T, int NP>
__global__ void __launch_bounds__(NP)
sequential_gradients_forward(Layout layout, const T* __restrict__ r, const T* __restrict__ k, const T* __restrict__ v,
                             const T* __restrict__ gy, const float* state0, const float* gstate_end, T* gr, float* gw, float* gu) {
    __shared__ float v_t[NP], gy_t[NP];
    const int c = threadIdx.x, n = layout.head_size, head = blockIdx.y;
    const int64_t stride = int64_t(layout.n_heads) * n, square = (int64_t(blockIdx.x) * layout.n_heads + head) * n * n;
    const bool inside = c < n;
    const float w = inside ? layout.w[head * n + c] : 0.f, u = inside ? layout.u[head * n + c] : 0.f;
    float state[NP], by_w[NP], gw_c = 0, gu_c = 0;
#pragma unroll
    for (int j = 0; j < NP; ++j) {
        state[j] = state0 != nullptr && inside && j < n ? state0[square + c * n + j] : 0.f;
        by_w[j] = 0;
    }
    for (int t = layout.cu_seqlens[blockIdx.x]; t < layout.cu_seqlens[blockIdx.x + 1]; ++t) {
        const int64_t at = t * stride + head * n + c;
        __syncthreads();
        v_t[c] = inside ? to_float(v[at]) : 0.f;
        gy_t[c] = inside ? to_float(gy[at]) : 0.f;
        const float r_c = inside ? to_float(r[at]) : 0.f, k_c = inside ? to_float(k[at]) : 0.f;
        __syncthreads();
        float of_state = 0, of_by_w = 0, vgy = 0;
#pragma unroll
        for (int j = 0; j < NP; ++j) {
            of_state += gy_t[j] * state[j];
            of_by_w += gy_t[j] * by_w[j];
            vgy += gy_t[j] * v_t[j];
            by_w[j] = w * by_w[j] + state[j];
            state[j] = w * state[j] + k_c * v_t[j];
        }
        gw_c += r_c * of_by_w;
        gu_c += r_c * k_c * vgy;
        if (inside) from_float(gr[at], of_state + u * k_c * vgy);
    }
    if (!inside) return;
#pragma unroll
    for (int j = 0; j < NP; ++j)
        if (gstate_end != nullptr && j < n) gw_c += gstate_end[square + c * n + j] * by_w[j];
    gw[blockIdx.x * stride + head * n + c] = gw_c;
    gu[blockIdx.x * stride + head * n + c] = gu_c;
}

// Backward in time: thread c holds row c and column c of the state's gradient; gradients of k, v and the first state.
template <class T, int NP>
__global__ void __launch_bounds__(NP)
sequential_gradients_backward(Layout layout, const T* __restrict__ r, const T* __restrict__ k, const T* __restrict__ v,
                              const T* __restrict__ gy, const float* gstate_end, T* gk, T* gv, float* gstate0) {
    __shared__ float r_t[NP], k_t[NP], v_t[NP], gy_t[NP], w[NP], u[NP];
    const int c = threadIdx.x, n = layout.head_size, head = blockIdx.y;
    const int64_t stride = int64_t(layout.n_heads) * n, square = (int64_t(blockIdx.x) * layout.n_heads + head) * n * n;
    const bool inside = c < n;
    w[c] = inside ? layout.w[head * n + c] : 0.f;
    u[c] = inside ? layout.u[head * n + c] : 0.f;
    float row[NP], column[NP];
#pragma unroll
    for (int i = 0; i < NP; ++i) {
        const bool given = gstate_end != nullptr && inside && i < n;
        row[i] = given ? gstate_end[square + c * n + i] : 0.f;
        column[i] = given ? gstate_end[square + i * n + c] : 0.f;
    }
    for (int t = layout.cu_seqlens[blockIdx.x + 1] - 1; t >= layout.cu_seqlens[blockIdx.x]; --t) {
        const int64_t at = t * stride + head * n + c;
        __syncthreads();
        r_t[c] = inside ? to_float(r[at]) : 0.f;
        k_t[c] = inside ? to_float(k[at]) : 0.f;
        v_t[c] = inside ? to_float(v[at]) : 0.f;
        gy_t[c] = inside ? to_float(gy[at]) : 0.f;
        __syncthreads();
        float gk_c = 0, gv_c = 0, vgy = 0, bonus = 0;
#pragma unroll
        for (int i = 0; i < NP; ++i) {
            gk_c += row[i] * v_t[i];
            vgy += v_t[i] * gy_t[i];
            row[i] = w[c] * row[i] + r_t[c] * gy_t[i];
        }
#pragma unroll
        for (int i = 0; i < NP; ++i) {
            gv_c += column[i] * k_t[i];
            bonus += r_t[i] * u[i] * k_t[i];
            column[i] = w[i] * column[i] + r_t[i] * gy_t[c];
        }
        if (inside) {
            from_float(gk[at], gk_c + u[c] * r_t[c] * vgy);
            from_float(gv[at], gv_c + bonus * gy_t[c]);
        }
    }
#pragma unroll
    for (int j = 0; j < NP; ++j)
        if (inside && j < n) gstate0[square + c * n + j] = row[j];
}

template <class... Parameters, class... Arguments>
cudaError_t launch(const Layout& layout, int threads, void (*kernel)(Layout, Parameters...), Arguments... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(layout.n_sequences, layout.n_heads);
    config.blockDim = dim3(threads);
    config.stream = layout.stream;
    return cudaLaunchKernelEx(&config, kernel, layout, arguments...);
}

template <class T>
struct Of {
    const T *r, *k, *v, *gy;
    T *y, *gr, *gk, *gv;
    const float *state0, *gstate_end;
    float *state_end, *gw, *gu, *gstate0;

    template <int NP>
    cudaError_t run(const Layout& layout, bool backward) const {
        if (!backward) return launch(layout, NP, sequential_forward<T, NP>, r, k, v, state0, y, state_end);
        const cudaError_t error =
            launch(layout, NP, sequential_gradients_forward<T, NP>, r, k, v, gy, state0, gstate_end, gr, gw, gu);
        if (error != cudaSuccess) return error;
        return launch(layout, NP, sequential_gradients_backward<T, NP>, r, k, v, gy, gstate_end, gk, gv, gstate0);
    }
};

template <class T>
cudaError_t run(const Layout& layout, bool backward, void* const* p) {
    const auto t = [&](int i) { return static_cast<T*>(p[i]); };
    const auto f = [&](int i) { return static_cast<float*>(p[i]); };
    const Of<T> of = {t(0), t(1), t(2), t(3), t(4), t(5), t(6), t(7), f(8), f(9), f(10), f(11), f(12), f(13)};
    if (layout.head_size <= 32) return of.template run<32>(layout, backward);
    if (layout.head_size <= 64) return of.template run<64>(layout, backward);
    return of.template run<128>(layout, backward);
}

}  // namespace

// `pointers`: r k v gy y gr gk gv state0 gstate_end state_end gw gu gstate0, null where a direction has no use for one.
extern "C" int wkv5_sequential(const Layout* layout, int backward, void* const* pointers) {
    if (layout->n_sequences == 0) return cudaSuccess;
    if (layout->dtype == 0) return run<float>(*layout, backward, pointers);
    if (layout->dtype == 1) return run<__nv_bfloat16>(*layout, backward, pointers);
    return run<__half>(*layout, backward, pointers);
}
