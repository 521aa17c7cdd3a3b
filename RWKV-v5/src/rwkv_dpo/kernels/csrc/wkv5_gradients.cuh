// The gradients of everything inside a segment, from the state before it and the gradient of the state after it.
#pragma once

#include "wkv5_tile.cuh"

namespace {

template <class T>
struct Tokens {
    const T *r, *k, *v, *gy;
};

template <int NP>
struct GradientShared {
    using Tile = Tiling<NP>;
    static constexpr int kTokens = Tile::kGradientTokens;
    alignas(16) float r[kTokens][NP], k[kTokens][NP], v[kTokens][NP], gy[kTokens][NP];
    float bonus[kTokens][Tile::kGroups];                    // parts of sum_i r[i] u[i] k[i]
    float vgy[kTokens][Tile::kGroups];                      // parts of sum_j v[j] gy[j]
    float by_values[kTokens][Tile::kGroups][Tile::kPitch];  // sums over a group of values, for the gradients of r and k
    float by_keys[kTokens][Tile::kGroups][Tile::kPitch];    // sums over a group of keys, for the gradient of v
    float u[NP];
};

template <class T, int NP>
__device__ inline void stage_all(const Work<NP>& work, GradientShared<NP>& shared, const Tokens<T>& tokens, int begin, int n) {
    work.stage(shared.r, tokens.r, begin, n);
    work.stage(shared.k, tokens.k, begin, n);
    work.stage(shared.v, tokens.v, begin, n);
    work.stage(shared.gy, tokens.gy, begin, n);
}

// Forward in time with S and, from zero, D = dS/dw (D <- w D + S): gradients of r and, one partial sum per segment, of w and u.
// What w does here to all later segments is <gradient of the end state, D>.
template <class T, int NP>
__device__ inline void gradients_forward(const Problem& problem, const Work<NP>& work, GradientShared<NP>& shared,
                                         const Tokens<T>& tokens, const float* states, const float* state_grads, T* gr, float* gw,
                                         float* gu) {
    using Tile = Tiling<NP>;
    constexpr int kTokens = Tile::kGradientTokens;
    const Quad<float> u = work.load_quad(problem.u);
    Quad<float> gu_sum{};
    float state[Tile::kTile][Tile::kTile], by_w[Tile::kTile][Tile::kTile] = {}, w[Tile::kTile], gw_sum[Tile::kTile] = {};
    work.load_square(state, states);
    work.load_decays(w, problem.time_decay);
    for (int begin = 0; begin < work.length; begin += kTokens) {
        const int n = min(kTokens, work.length - begin);
        stage_all(work, shared, tokens, begin, n);
        __syncthreads();
        work.sum_channels(shared.vgy, n, [&](int t, int group) { return group_dot(shared.v[t], shared.gy[t], group); });
#pragma unroll 1
        for (int t = 0; t < n; ++t) {
            float r_t[Tile::kTile], k_t[Tile::kTile], v_t[Tile::kTile], gy_t[Tile::kTile], gr_t[Tile::kTile];
            gather<NP>(r_t, shared.r[t], work.keys);
            gather<NP>(k_t, shared.k[t], work.keys);
            gather<NP>(v_t, shared.v[t], work.values);
            gather<NP>(gy_t, shared.gy[t], work.values);
#pragma unroll
            for (int i = 0; i < Tile::kTile; ++i) {
                float of_state = 0, of_by_w = 0;
#pragma unroll
                for (int j = 0; j < Tile::kTile; ++j) {
                    of_state += gy_t[j] * state[i][j];
                    of_by_w += gy_t[j] * by_w[i][j];
                    by_w[i][j] = w[i] * by_w[i][j] + state[i][j];
                    state[i][j] = w[i] * state[i][j] + k_t[i] * v_t[j];
                }
                gr_t[i] = of_state;
                gw_sum[i] += r_t[i] * of_by_w;
            }
            scatter<NP>(shared.by_values[t][work.values], gr_t, work.keys);
        }
        __syncthreads();
        work.write(gr, begin, n, shared.by_values, [&](int t) {
            const Quad<float> r_t = load(&shared.r[t][work.quad]), k_t = load(&shared.k[t][work.quad]);
            const float vgy = total(shared.vgy[t]);
            Quad<float> x;
            for (int q = 0; q < 4; ++q) {
                gu_sum.at[q] += r_t.at[q] * k_t.at[q] * vgy;
                x.at[q] = u.at[q] * k_t.at[q] * vgy;
            }
            return x;
        });
        // No barrier: the quads of the next tokens replace only what the same thread has just read.
    }

    work.load_square(state, state_grads);
#pragma unroll
    for (int i = 0; i < Tile::kTile; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kTile; ++j) gw_sum[i] += state[i][j] * by_w[i][j];
    __syncthreads();
    scatter<NP>(shared.by_values[0][work.values], gw_sum, work.keys);
    store(&shared.by_values[1][work.token][work.quad], gu_sum);
    __syncthreads();
    const int c = threadIdx.x;
    if (c < work.head_size) {
        float gw_c = 0, gu_c = 0;
        for (int group = 0; group < Tile::kGroups; ++group) gw_c += shared.by_values[0][group][c];
        for (int token = 0; token < Tile::kStride; ++token) gu_c += shared.by_values[1][token][c];
        gw[work.sums + c] = gw_c;
        gu[work.sums + c] = gu_c;
    }
}

// Backward in time with G, the gradient of the state after a token: gradients of k and v.
template <class T, int NP>
__device__ inline void gradients_backward(const Problem& problem, const Work<NP>& work, GradientShared<NP>& shared,
                                          const Tokens<T>& tokens, const float* state_grads, T* gk, T* gv) {
    using Tile = Tiling<NP>;
    constexpr int kTokens = Tile::kGradientTokens;
    const Quad<float> u = work.load_quad(problem.u);
    if (work.token == 0) store(&shared.u[work.quad], u);
    float grad[Tile::kTile][Tile::kTile], w[Tile::kTile];
    work.load_square(grad, state_grads);
    work.load_decays(w, problem.time_decay);
    for (int begin = (work.length - 1) / kTokens * kTokens; begin >= 0; begin -= kTokens) {
        const int n = min(kTokens, work.length - begin);
        stage_all(work, shared, tokens, begin, n);
        __syncthreads();
        work.sum_channels(shared.vgy, n, [&](int t, int group) { return group_dot(shared.v[t], shared.gy[t], group); });
        work.sum_channels(shared.bonus, n, [&](int t, int group) { return group_dot(shared.r[t], shared.k[t], group, &shared.u); });
#pragma unroll 1
        for (int t = n - 1; t >= 0; --t) {
            float r_t[Tile::kTile], k_t[Tile::kTile], v_t[Tile::kTile], gy_t[Tile::kTile];
            float gk_t[Tile::kTile], gv_t[Tile::kTile] = {};
            gather<NP>(r_t, shared.r[t], work.keys);
            gather<NP>(k_t, shared.k[t], work.keys);
            gather<NP>(v_t, shared.v[t], work.values);
            gather<NP>(gy_t, shared.gy[t], work.values);
#pragma unroll
            for (int i = 0; i < Tile::kTile; ++i) {
                float of_grad = 0;
#pragma unroll
                for (int j = 0; j < Tile::kTile; ++j) {
                    of_grad += v_t[j] * grad[i][j];
                    gv_t[j] += k_t[i] * grad[i][j];
                    grad[i][j] = w[i] * grad[i][j] + r_t[i] * gy_t[j];
                }
                gk_t[i] = of_grad;
            }
            scatter<NP>(shared.by_values[t][work.values], gk_t, work.keys);
            scatter<NP>(shared.by_keys[t][work.keys], gv_t, work.values);
        }
        __syncthreads();
        work.write(gk, begin, n, shared.by_values, [&](int t) {
            Quad<float> x = load(&shared.r[t][work.quad]);
            const float vgy = total(shared.vgy[t]);
            for (int q = 0; q < 4; ++q) x.at[q] *= u.at[q] * vgy;
            return x;
        });
        work.write(gv, begin, n, shared.by_keys, [&](int t) {
            Quad<float> x = load(&shared.gy[t][work.quad]);
            const float bonus = total(shared.bonus[t]);
            for (int q = 0; q < 4; ++q) x.at[q] *= bonus;
            return x;
        });
    }
}

// Two kinds of blocks that share nothing, in one launch: each fills the processors that the other leaves idle.
template <class T, int NP>
__global__ void __launch_bounds__(Tiling<NP>::kThreads)
segment_gradients(Problem problem, Tokens<T> tokens, const float* __restrict__ states, const float* __restrict__ state_grads,
                  T* __restrict__ gr, T* __restrict__ gk, T* __restrict__ gv, float* __restrict__ gw, float* __restrict__ gu) {
    __shared__ GradientShared<NP> shared;
    const Work<NP> work(problem);
    if (blockIdx.z == 0)
        gradients_forward(problem, work, shared, tokens, states, state_grads, gr, gw, gu);
    else
        gradients_backward(problem, work, shared, tokens, state_grads, gk, gv);
}

}  // namespace
