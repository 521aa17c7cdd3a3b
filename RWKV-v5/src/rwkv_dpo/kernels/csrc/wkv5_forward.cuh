// The forward kernels; the first two also run backwards in time for the gradients. wkv5_cuda.cu says how they fit together.
#pragma once

#include "wkv5_tile.cuh"

namespace {

// S = sum_t w^(length - 1 - t) k_t v_t, or with `reverse` sum_t w^t r_t gy_t (pass r for `left`, gy for `right`).
template <class T, int NP>
__global__ void __launch_bounds__(Tiling<NP>::kThreads)
segment_states(Problem problem, const T* __restrict__ left, const T* __restrict__ right, bool reverse, float* __restrict__ states) {
    using Tile = Tiling<NP>;
    constexpr int kTokens = Tile::kStateTokens;
    __shared__ struct {
        alignas(16) float left[kTokens][NP], right[kTokens][NP];
    } shared;
    const Work<NP> work(problem);

    Quad<float> rate = work.load_quad(problem.time_decay);
    for (int q = 0; q < 4; ++q) rate.at[q] = decay_rate(rate.at[q]);
    float state[Tile::kTile][Tile::kTile] = {};
    for (int begin = 0; begin < work.length; begin += kTokens) {
        const int n = min(kTokens, work.length - begin);
        work.stage(shared.left, left, begin, n, [&](int t, Quad<float> x) {
            const float age = reverse ? begin + t : work.length - 1 - begin - t;
            for (int q = 0; q < 4; ++q) x.at[q] *= exp2f(-age * rate.at[q]);
            return x;
        });
        work.stage(shared.right, right, begin, n);
        __syncthreads();
#pragma unroll 1
        for (int t = 0; t < n; ++t) {
            float a[Tile::kTile], b[Tile::kTile];
            gather<NP>(a, shared.left[t], work.keys);
            gather<NP>(b, shared.right[t], work.values);
#pragma unroll
            for (int i = 0; i < Tile::kTile; ++i)
#pragma unroll
                for (int j = 0; j < Tile::kTile; ++j) state[i][j] += a[i] * b[j];
        }
        __syncthreads();
    }
    work.store_square(states, state);
}

// One thread per element of the state. In: what every segment adds. Out, in its place: the state before the segment (with
// `reverse`: after it, as gradients flow). `initial` and `last` may be null: zeros, not wanted.
constexpr int kScanThreads = 256;

__global__ void __launch_bounds__(kScanThreads)
scan_segments(Problem problem, const int* __restrict__ first_segment, const float* __restrict__ initial, bool reverse,
              float* states, float* __restrict__ last) {
    constexpr int kAhead = 8;  // loads in flight: the chain from segment to segment must not wait for memory
    const int size = problem.head_size * problem.head_size;
    const int element = blockIdx.z * kScanThreads + threadIdx.x;
    if (element >= size) return;
    const float rate = decay_rate(problem.time_decay[blockIdx.y * problem.head_size + element / problem.head_size]);
    const int64_t of_sequence = (int64_t(blockIdx.x) * problem.n_heads + blockIdx.y) * size + element;
    const int begin = first_segment[blockIdx.x], n = first_segment[blockIdx.x + 1] - begin;

    float carry = initial == nullptr ? 0.f : initial[of_sequence];
    for (int done = 0; done < n; done += kAhead) {
        float added[kAhead], decay[kAhead];
        float* at[kAhead];
#pragma unroll
        for (int q = 0; q < kAhead; ++q)
            if (done + q < n) {
                const int segment = reverse ? begin + n - 1 - done - q : begin + done + q;
                at[q] = states + (int64_t(segment) * problem.n_heads + blockIdx.y) * size + element;
                added[q] = *at[q];
                decay[q] = exp2f(-rate * problem.segments[segment].length);
            }
#pragma unroll
        for (int q = 0; q < kAhead; ++q)
            if (done + q < n) {
                *at[q] = carry;
                carry = decay[q] * carry + added[q];
            }
    }
    if (last != nullptr) last[of_sequence] = carry;
}

template <class T, int NP>
__global__ void __launch_bounds__(Tiling<NP>::kThreads)
segment_outputs(Problem problem, const T* __restrict__ r, const T* __restrict__ k, const T* __restrict__ v,
                const float* __restrict__ states, T* __restrict__ y) {
    using Tile = Tiling<NP>;
    constexpr int kTokens = Tile::kOutputTokens;
    __shared__ struct {
        alignas(16) float r[kTokens][NP], k[kTokens][NP], v[kTokens][NP];
        float bonus[kTokens][Tile::kGroups];               // parts of sum_i r[i] u[i] k[i]
        float sums[kTokens][Tile::kGroups][Tile::kPitch];  // parts of y, by group of keys
        float u[NP];
    } shared;
    const Work<NP> work(problem);

    if (work.token == 0) store(&shared.u[work.quad], work.load_quad(problem.u));
    float state[Tile::kTile][Tile::kTile], w[Tile::kTile];
    work.load_square(state, states);
    work.load_decays(w, problem.time_decay);
    for (int begin = 0; begin < work.length; begin += kTokens) {
        const int n = min(kTokens, work.length - begin);
        work.stage(shared.r, r, begin, n);
        work.stage(shared.k, k, begin, n);
        work.stage(shared.v, v, begin, n);
        __syncthreads();
        work.sum_channels(shared.bonus, n, [&](int t, int group) { return group_dot(shared.r[t], shared.k[t], group, &shared.u); });
#pragma unroll 1
        for (int t = 0; t < n; ++t) {
            float r_t[Tile::kTile], k_t[Tile::kTile], v_t[Tile::kTile], y_t[Tile::kTile] = {};
            gather<NP>(r_t, shared.r[t], work.keys);
            gather<NP>(k_t, shared.k[t], work.keys);
            gather<NP>(v_t, shared.v[t], work.values);
#pragma unroll
            for (int i = 0; i < Tile::kTile; ++i)
#pragma unroll
                for (int j = 0; j < Tile::kTile; ++j) {
                    y_t[j] += r_t[i] * state[i][j];
                    state[i][j] = w[i] * state[i][j] + k_t[i] * v_t[j];
                }
            scatter<NP>(shared.sums[t][work.keys], y_t, work.values);
        }
        __syncthreads();
        work.write(y, begin, n, shared.sums, [&](int t) {
            Quad<float> x = load(&shared.v[t][work.quad]);
            const float bonus = total(shared.bonus[t]);
            for (int q = 0; q < 4; ++q) x.at[q] *= bonus;
            return x;
        });
        // No barrier: the quads of the next tokens replace only what the same thread has just read.
    }
}

}  // namespace
