// What the WKV-5 kernels share: how the threads of a block divide the state of a head, and how tokens reach them.
#pragma once

#include "wkv_cuda.cuh"

namespace {

struct Problem {
    int n_heads, head_size;
    const Segment* segments;
    const float* time_decay;  // [H, N]
    const float* u;           // [H, N]
};

// NP is the head size rounded up; the channels beyond the true one are zero everywhere.
template <int NP>
struct Tiling {
    static constexpr int kTile = NP == 32 ? 4 : 8;
    static constexpr int kGroups = NP / kTile;  // groups of keys, and of values
    static constexpr int kThreads = kGroups * kGroups;
    static constexpr int kPitch = NP + 4;              // spreads equal channels of eight groups over the banks
    static constexpr int kStride = kThreads * 4 / NP;  // tokens that one sweep of all threads, a quad each, covers
    // Tokens staged at a time by each kernel: many hide the latency of memory, their partial sums fill shared memory.
    static constexpr int kStateTokens = 16;
    static constexpr int kOutputTokens = NP <= 64 ? 8 : 4;
    static constexpr int kGradientTokens = NP <= 64 ? 8 : NP == 96 ? 4 : 2;
    static_assert(kThreads * 4 % NP == 0, "a thread must keep its channels from token to token");
};

// -log2 w: w^n is exp2f(-n * rate), which doesn't compound the rounding of a w near 1. The bound changes nothing in fp32, where
// 2^-200 is 0, and keeps 0 * rate a number. Not fminf, which would take the bound for NaN.
__device__ inline float decay_rate(float time_decay) {
    const float rate = expf(time_decay) * 1.44269504f;
    return rate > 200.f ? 200.f : rate;
}

// The q-th channel of a group. Quads of neighbouring groups are neighbours, so that eight threads read 128 bytes in a row.
template <int NP>
__device__ inline int channel(int group, int q) {
    return (q / 4 * Tiling<NP>::kGroups + group) * 4 + q % 4;
}

template <int NP>
__device__ inline void gather(float (&to)[Tiling<NP>::kTile], const float (&from)[NP], int group) {
#pragma unroll
    for (int q = 0; q < Tiling<NP>::kTile; q += 4) {
        const Quad<float> x = load(&from[channel<NP>(group, q)]);
        for (int p = 0; p < 4; ++p) to[q + p] = x.at[p];
    }
}

template <int NP>
__device__ inline void scatter(float (&to)[Tiling<NP>::kPitch], const float (&from)[Tiling<NP>::kTile], int group) {
#pragma unroll
    for (int q = 0; q < Tiling<NP>::kTile; q += 4)
        store(&to[channel<NP>(group, q)], {from[q], from[q + 1], from[q + 2], from[q + 3]});
}

// What a block works on: one head of one segment; and what a thread of it owns.
template <int NP>
struct Work {
    using Tile = Tiling<NP>;
    int head_size, length, row_stride, keys, values, token, quad;
    int64_t first;        // of [S, H, N]; within a segment 32 bits suffice
    int channels;         // of [H, N]
    int64_t sums, state;  // of [n_segments, H, N] and [n_segments, H, N, N]

    __device__ explicit Work(const Problem& problem)
        : head_size(problem.head_size),
          length(problem.segments[blockIdx.x].length),
          row_stride(problem.n_heads * head_size),
          keys(threadIdx.x / Tile::kGroups),
          values(threadIdx.x % Tile::kGroups),
          token(threadIdx.x * 4 / NP),
          quad(threadIdx.x * 4 % NP),
          first(int64_t(problem.segments[blockIdx.x].first_row) * row_stride + blockIdx.y * head_size),
          channels(blockIdx.y * head_size),
          sums(int64_t(blockIdx.x) * row_stride + channels),
          state(sums * head_size) {}

    // The thread's square of a state in device memory.
    __device__ void load_square(float (&square)[Tile::kTile][Tile::kTile], const float* states) const {
#pragma unroll
        for (int i = 0; i < Tile::kTile; ++i)
#pragma unroll
            for (int j = 0; j < Tile::kTile; j += 4) {
                const int key = channel<NP>(keys, i), value = channel<NP>(values, j);
                const bool inside = key < head_size && value < head_size;
                const Quad<float> x = inside ? load(states + state + key * head_size + value) : Quad<float>{};
                for (int q = 0; q < 4; ++q) square[i][j + q] = x.at[q];
            }
    }

    __device__ void store_square(float* states, const float (&square)[Tile::kTile][Tile::kTile]) const {
#pragma unroll
        for (int i = 0; i < Tile::kTile; ++i)
#pragma unroll
            for (int j = 0; j < Tile::kTile; j += 4) {
                const int key = channel<NP>(keys, i), value = channel<NP>(values, j);
                if (key < head_size && value < head_size)
                    store(states + state + key * head_size + value,
                          {square[i][j], square[i][j + 1], square[i][j + 2], square[i][j + 3]});
            }
    }

    __device__ void load_decays(float (&w)[Tile::kTile], const float* time_decay) const {
#pragma unroll
        for (int i = 0; i < Tile::kTile; ++i) {
            const int key = channel<NP>(keys, i);
            w[i] = key < head_size ? exp2f(-decay_rate(time_decay[channels + key])) : 0.f;
        }
    }

    __device__ Quad<float> load_quad(const float* from) const {
        return quad < head_size ? load(from + channels + quad) : Quad<float>{};
    }

    // The tokens begin .. begin + n of a [S, H, N] tensor into shared memory, in fp32, each quad through `map(t, quad)`.
    template <class T, int kTokens, class Map>
    __device__ void stage(float (&to)[kTokens][NP], const T* from, int begin, int n, Map map) const {
#pragma unroll
        for (int turn = 0; turn < kTokens; turn += Tile::kStride) {
            const int t = turn + token;
            if (t < n) {
                const bool inside = quad < head_size;
                store(&to[t][quad], map(t, inside ? load(from + first + ((begin + t) * row_stride + quad)) : Quad<float>{}));
            }
        }
    }

    template <class T, int kTokens>
    __device__ void stage(float (&to)[kTokens][NP], const T* from, int begin, int n) const {
        stage(to, from, begin, n, [](int, Quad<float> x) { return x; });
    }

    // Per token t and group: term(t, group), a part of a sum over channels; total() adds the parts up.
    template <int kTokens, class Term>
    __device__ void sum_channels(float (&parts)[kTokens][Tile::kGroups], int n, Term term) const {
#pragma unroll
        for (int turn = 0; turn < kTokens; turn += Tile::kGroups) {
            const int t = turn + keys;
            if (t < n) parts[t][values] = term(t, values);
        }
    }

    // Writes tokens of a [S, H, N] tensor: what the groups summed, plus more(t).
    template <class T, int kTokens, class More>
    __device__ void write(T* to, int begin, int n, const float (&sums)[kTokens][Tile::kGroups][Tile::kPitch], More more) const {
#pragma unroll
        for (int turn = 0; turn < kTokens; turn += Tile::kStride) {
            const int t = turn + token;
            if (t < n && quad < head_size) {
                Quad<float> sum = more(t);
#pragma unroll
                for (int group = 0; group < Tile::kGroups; ++group) {
                    const Quad<float> x = load(&sums[t][group][quad]);
                    for (int q = 0; q < 4; ++q) sum.at[q] += x.at[q];
                }
                store(to + first + ((begin + t) * row_stride + quad), sum);
            }
        }
    }
};

// The products of two rows, of three with `c`, summed over a group of channels.
template <int NP>
__device__ inline float group_dot(const float (&a)[NP], const float (&b)[NP], int group, const float (*c)[NP] = nullptr) {
    float a_q[Tiling<NP>::kTile], b_q[Tiling<NP>::kTile], c_q[Tiling<NP>::kTile], sum = 0;
    gather<NP>(a_q, a, group);
    gather<NP>(b_q, b, group);
    if (c != nullptr) gather<NP>(c_q, *c, group);
#pragma unroll
    for (int q = 0; q < Tiling<NP>::kTile; ++q) sum += c != nullptr ? a_q[q] * b_q[q] * c_q[q] : a_q[q] * b_q[q];
    return sum;
}

template <int n>
__device__ inline float total(const float (&parts)[n]) {
    float sum = 0;
#pragma unroll
    for (int group = 0; group < n; group += 4) {
        const Quad<float> x = load(&parts[group]);
        sum += (x.at[0] + x.at[1]) + (x.at[2] + x.at[3]);
    }
    return sum;
}

}  // namespace
