// The gradients that sum over values, of everything inside a segment, a row of the state being one key: once it is known what each token
// takes out of the state, and the gradient of that, keys are independent of one another, and so are segments.
//
// It takes S before each token and G after it. S is replayed: from the segment's start to the start of each kTokens, which shared memory
// keeps, and from there to each of them. Running S backwards would divide by w again and again.
#pragma once

#include "wkv_lanes.cuh"

namespace {

template <class T>
struct Gradients {
    const T* keys[4];    // r, k and, of WKV-7, a, b
    const T *v, *gy;
    const float *log_w, *u, *taken, *g_taken;  // u of WKV-6 alone, the latter two of WKV-7
    const float* states;                       // [n_segments, H, N, N], S before a segment
    const float* state_grads;                  // G after it
    T* key_grads[4];
    float* g_log_w;
    float* gu;           // [n_segments, H, N], to be added up
};

template <bool takes, class T, int NP>
__global__ void __launch_bounds__(kThreads)
segment_gradients(int n_heads, int head_size, const Segment* segments, Gradients<T> of) {
    using At = Place<NP>;
    constexpr int kKeys = takes ? 4 : 2, kBlocks = kSegment / kTokens, kValues = takes ? kTokens : 1;
    __shared__ struct {
        alignas(16) float v[kTokens][NP], gy[kTokens][NP], taken[kValues][NP], g_taken[kValues][NP];
        alignas(16) float keys[kKeys][kTokens][At::kRows], w[kTokens][At::kRows];
        alignas(16) float key_grads[kKeys][kTokens][At::kRows], g_log_w[kTokens][At::kRows];
        Quad<float> starts[kBlocks][kElements / 4][kThreads];  // S before each kTokens; every thread has its own part
    } shared;
    const At at(n_heads, head_size);
    const Segment segment = segments[blockIdx.x];
    const int n_blocks = (segment.length + kTokens - 1) / kTokens;
    const float u = !takes && at.has_row() ? of.u[at.channels + at.slice + at.row] : 0.f;
    float gu = 0;

    // Into shared memory: what a replay takes, or with `all` everything of a block.
    const auto stage = [&](int block, bool all) {
        const int n = min(kTokens, segment.length - block * kTokens);
        const int64_t from = at.rows(int64_t(segment.first_row) + block * kTokens);
        Staged<T, NP> v, gy;
        Staged<T, At::kRows> keys[kKeys];
        Staged<float, At::kRows> log_w;
        v.fetch(at, of.v + from, n);
        if (all) gy.fetch(at, of.gy + from, n);
#pragma unroll
        for (int i = 0; i < kKeys; ++i) keys[i].fetch(at, of.keys[i] + from, n, at.slice);
        log_w.fetch(at, of.log_w + from, n, at.slice);
        if constexpr (takes) {
            Staged<float, NP> taken, g_taken;
            taken.fetch(at, of.taken + from, n);
            if (all) g_taken.fetch(at, of.g_taken + from, n);
            taken.put(shared.taken);
            if (all) g_taken.put(shared.g_taken);
        }
        v.put(shared.v);
        if (all) gy.put(shared.gy);
#pragma unroll
        for (int i = 0; i < kKeys; ++i) keys[i].put(shared.keys[i]);
        log_w.put_exp(shared.w);
    };
    // S after token t of what is staged.
    const auto replay = [&](float (&to)[kElements], const float (&from)[kElements], int t) {
        float v[kElements];
        at.gather(v, shared.v[t]);
        const float w = shared.w[t][at.row], k = shared.keys[1][t][at.row];
#pragma unroll
        for (int q = 0; q < kElements; ++q) to[q] = w * from[q] + k * v[q];
        if constexpr (takes) {
            float taken[kElements];
            at.gather(taken, shared.taken[t]);
            const float b = shared.keys[3][t][at.row];
#pragma unroll
            for (int q = 0; q < kElements; ++q) to[q] += b * taken[q];
        }
    };

    float state[kElements], grad[kElements];
    at.template load_state<false>(state, of.states + at.state(blockIdx.x));
    for (int block = 0;; ++block) {
#pragma unroll
        for (int q = 0; q < kElements; q += 4)
            shared.starts[block][q / 4][threadIdx.x] = {state[q], state[q + 1], state[q + 2], state[q + 3]};
        if (block + 1 >= n_blocks) break;
        stage(block, false);
        __syncthreads();
#pragma unroll
        for (int t = 0; t < kTokens; ++t) replay(state, state, t);
        __syncthreads();
    }
    at.template load_state<false>(grad, of.state_grads + at.state(blockIdx.x));
    for (int block = n_blocks - 1; block >= 0; --block) {
        stage(block, true);
        __syncthreads();
        float before[kTokens + 1][kElements];  // S before token t
#pragma unroll
        for (int q = 0; q < kElements; ++q) before[0][q] = shared.starts[block][q / 4][threadIdx.x].at[q % 4];
#pragma unroll
        for (int t = 0; t < kTokens; ++t) replay(before[t + 1], before[t], t);
#pragma unroll
        for (int t = kTokens - 1; t >= 0; --t) {
            __syncwarp();  // else nvcc has the next tokens' numbers wait in registers, too many of them since sm_100
            float v[kElements], gy[kElements];
            at.gather(v, shared.v[t]);
            at.gather(gy, shared.gy[t]);
            const float r = shared.keys[0][t][at.row], k = shared.keys[1][t][at.row], w = shared.w[t][at.row];
            float gr, gk, ga = 0, gb = 0, through;
            if constexpr (!takes) {
                const float bonus = total<NP>(dot(v, gy));
                gr = total<NP>(dot(before[t], gy)) + u * k * bonus;
                gk = total<NP>(dot(grad, v)) + u * r * bonus;
                through = total<NP>(dot(before[t], grad));
                gu += r * k * bonus;
#pragma unroll
                for (int q = 0; q < kElements; ++q) grad[q] = w * grad[q] + r * gy[q];
            } else {
                const float a = shared.keys[2][t][at.row];
                float taken[kElements], g_taken[kElements];
                at.gather(taken, shared.taken[t]);
                at.gather(g_taken, shared.g_taken[t]);
#pragma unroll
                for (int q = 0; q < kElements; ++q) grad[q] += r * gy[q];
                gr = total<NP>(dot(before[t + 1], gy));
                gk = total<NP>(dot(grad, v));
                ga = total<NP>(dot(before[t], g_taken));
                gb = total<NP>(dot(grad, taken));
                through = total<NP>(dot(before[t], grad));
#pragma unroll
                for (int q = 0; q < kElements; ++q) grad[q] = w * grad[q] + a * g_taken[q];
            }
            if (at.lane == 0) {
                shared.key_grads[0][t][at.row] = gr;
                shared.key_grads[1][t][at.row] = gk;
                if constexpr (takes) shared.key_grads[2][t][at.row] = ga, shared.key_grads[3][t][at.row] = gb;
                shared.g_log_w[t][at.row] = w * through;
            }
        }
        __syncthreads();
        const int n = min(kTokens, segment.length - block * kTokens);
        const int64_t to = at.rows(int64_t(segment.first_row) + block * kTokens);
#pragma unroll
        for (int i = 0; i < kKeys; ++i) at.write(of.key_grads[i] + to, n, shared.key_grads[i]);
        at.write(of.g_log_w + to, n, shared.g_log_w);
        // No barrier: these are written again only behind the next one.
    }
    if (!takes && at.lane == 0 && at.has_row()) of.gu[at.rows(blockIdx.x) + at.slice + at.row] = gu;
}

template <bool takes, class T, int NP>
cudaError_t all_gradients(const Layout& layout, const Gradients<T>& of) {
    return launch(segment_gradients<takes, T, NP>, grid<NP>(layout, layout.n_segments), kThreads, layout.stream, layout.n_heads,
                  layout.head_size, layout.segments, of);
}

}  // namespace
