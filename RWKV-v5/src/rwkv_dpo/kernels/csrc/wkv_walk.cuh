// A walk over the tokens of whole sequences, a row of the state being one value: values are independent of one another.
//
// Forwards in time it makes y and, of WKV-7, what each token takes out of the state. Backwards it makes gv and, of WKV-7, the gradient of what
// was taken, with G = dL/dS in the state's place. Before every segment (of the walk) it keeps the state, for wkv_gradients.cuh.
#pragma once

#include "wkv_lanes.cuh"

namespace {

template <class T>
struct Walk {
    const T* keys[4];      // r, k, a, b; of WKV-6 what is read with and what is written with: r, k, or backwards k, r
    const T* payload;      // v, or backwards gy
    const float *log_w, *u;
    const float* first;    // state to begin from, or null
    T* out;                // y or gv
    float *taken, *kept;   // null when not wanted
    float* last;
};

// Three blocks a multiprocessor: for want of a number nvcc would rather spill than take registers that so few blocks leave free.
template <bool takes, bool backwards, class T, int NP>
__global__ void __launch_bounds__(kThreads, 3)
walk_tokens(int n_heads, int head_size, const Segment* segments, const int* first_segment, Walk<T> walk) {
    using At = Place<NP>;
    constexpr int kKeys = takes ? 4 : 2, kTiles = kSegment / kTokens;
    __shared__ struct {
        alignas(16) float keys[kKeys][kTokens][NP], w[kTokens][NP];
        alignas(16) float payload[kTokens][At::kRows], out[kTokens][At::kRows], taken[kTokens][At::kRows];
    } shared;
    const At at(n_heads, head_size);
    const int segment = first_segment[blockIdx.x], n_segments = first_segment[blockIdx.x + 1] - segment;
    const int length = n_segments == 0 ? 0 : (n_segments - 1) * kSegment + segments[segment + n_segments - 1].length;
    const int n_tiles = (length + kTokens - 1) / kTokens;
    const int64_t first_row = n_segments == 0 ? 0 : segments[segment].first_row;

    float state[kElements], u[kElements];
    at.template load_state<true>(state, walk.first == nullptr ? nullptr : walk.first + at.state(blockIdx.x));
#pragma unroll
    for (int q = 0; q < kElements; ++q) u[q] = !takes && at.channel(q) < head_size ? walk.u[at.channels + at.channel(q)] : 0.f;

    // The next tokens are on their way while these are computed.
    Staged<T, NP> keys[kKeys];
    Staged<float, NP> log_w;
    Staged<T, At::kRows> payload;
    const auto fetch = [&](int tile) {
        const int n = min(kTokens, length - tile * kTokens);
        const int64_t from = at.rows(first_row + tile * kTokens);
#pragma unroll
        for (int i = 0; i < kKeys; ++i) keys[i].fetch(at, walk.keys[i] + from, n);
        log_w.fetch(at, walk.log_w + from, n);
        payload.fetch(at, walk.payload + from, n, at.slice);
    };
    const auto tile_of = [&](int done) { return backwards ? n_tiles - 1 - done : done; };
    if (n_tiles > 0) fetch(tile_of(0));
    for (int done = 0; done < n_tiles; ++done) {
        const int tile = tile_of(done);
        const bool begins = backwards ? tile % kTiles == kTiles - 1 || done == 0 : tile % kTiles == 0;
        if (begins && walk.kept != nullptr) at.template store_state<true>(walk.kept + at.state(segment + tile / kTiles), state);
#pragma unroll
        for (int i = 0; i < kKeys; ++i) keys[i].put(shared.keys[i]);
        log_w.put_exp(shared.w);
        payload.put(shared.payload);
        __syncthreads();
        if (done + 1 < n_tiles) fetch(tile_of(done + 1));
#pragma unroll
        for (int turn = 0; turn < kTokens; ++turn) {
            const int t = backwards ? kTokens - 1 - turn : turn;
            const float x = shared.payload[t][at.row];
            float r[kElements], k[kElements], w[kElements], out = 0, taken = 0;
            at.gather(r, shared.keys[0][t]);
            at.gather(k, shared.keys[1][t]);
            at.gather(w, shared.w[t]);
            if constexpr (!takes) {
                float with_bonus[kElements];
#pragma unroll
                for (int q = 0; q < kElements; ++q) {
                    const float written = k[q] * x;
                    with_bonus[q] = state[q] + u[q] * written;
                    state[q] = w[q] * state[q] + written;
                }
                out = dot(r, with_bonus);
            } else {
                float a[kElements], b[kElements];
                at.gather(a, shared.keys[2][t]);
                at.gather(b, shared.keys[3][t]);
                if constexpr (backwards) {
#pragma unroll
                    for (int q = 0; q < kElements; ++q) state[q] += r[q] * x;
                    out = dot(k, state);
                    taken = total<NP>(dot(b, state));
#pragma unroll
                    for (int q = 0; q < kElements; ++q) state[q] = w[q] * state[q] + a[q] * taken;
                } else {
                    taken = total<NP>(dot(a, state));
#pragma unroll
                    for (int q = 0; q < kElements; ++q) state[q] = w[q] * state[q] + b[q] * taken + k[q] * x;
                    out = dot(r, state);
                }
            }
            out = total<NP>(out);
            if (at.lane == 0) shared.out[t][at.row] = out, shared.taken[t][at.row] = taken;
        }
        __syncthreads();
        const int n = min(kTokens, length - tile * kTokens);
        const int64_t to = at.rows(first_row + tile * kTokens);
        at.write(walk.out + to, n, shared.out);
        if (takes && walk.taken != nullptr) at.write(walk.taken + to, n, shared.taken);
        // No barrier: these two are written again only behind the next one.
    }
    if (walk.last != nullptr) at.template store_state<true>(walk.last + at.state(blockIdx.x), state);
}

template <bool takes, bool backwards, class T, int NP>
cudaError_t walk_all(const Layout& layout, const Walk<T>& walk) {
    return launch(walk_tokens<takes, backwards, T, NP>, grid<NP>(layout, layout.n_sequences), kThreads, layout.stream, layout.n_heads,
                  layout.head_size, layout.segments, layout.first_segment, walk);
}

}  // namespace
