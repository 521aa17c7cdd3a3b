// What the kernels of WKV-6 and WKV-7 share: how threads divide the state of a head, and how tokens reach them.
//
// A row of a state is one value with all its keys, or one key with all its values. Neighbouring threads, its lanes, have eight numbers of it
// each in registers, and a block has a slice of a head's rows. Tokens come through shared memory, kTokens at a time. Places behind the last
// token of a sequence or segment hold zeros, and w = exp(0) = 1: a state passes them unchanged.
#pragma once

#include "wkv_cuda.cuh"

namespace {

constexpr int kThreads = 128;
constexpr int kElements = 8;
constexpr int kTokens = 8;
// Tokens between the states that are kept for the backward pass. Mirrored as SEGMENT in kernels/cuda_walk.py.
constexpr int kSegment = 32;

// The widest head that a kernel has lanes for; channels beyond the true head size are zero everywhere.
template <int NP>
struct Place {
    static constexpr int kLanes = NP / kElements;    // 4, 8 or 16, within a warp
    static constexpr int kRows = kThreads / kLanes;  // of a slice

    int head_size, lane, row, slice;  // `row` of the slice, whose first one is `slice`
    int64_t stride;                   // from token to token
    int channels;                     // of [H, N], where the head's begin

    __device__ Place(int n_heads, int head_size)
        : head_size(head_size),
          lane(threadIdx.x % kLanes),
          row(threadIdx.x / kLanes),
          slice(blockIdx.z * kRows),
          stride(int64_t(n_heads) * head_size),
          channels(blockIdx.y * head_size) {}

    // Where a row of [S, H, N] or [n, H, N], and a state of [n, H, N, N], has this head.
    __device__ int64_t rows(int64_t n) const { return n * stride + channels; }
    __device__ int64_t state(int64_t n) const { return rows(n) * head_size; }

    // The thread's q-th channel along its row. Quads of neighbouring lanes are neighbours, so that eight lanes read 128 bytes in a row.
    __device__ int channel(int q) const { return (q / 4 * kLanes + lane) * 4 + q % 4; }
    __device__ bool has_row() const { return slice + row < head_size; }

    __device__ void gather(float (&to)[kElements], const float (&from)[NP]) const {
#pragma unroll
        for (int q = 0; q < kElements; q += 4) {
            const Quad<float> x = load(&from[channel(q)]);
            for (int p = 0; p < 4; ++p) to[q + p] = x.at[p];
        }
    }

    // The thread's part of a state [key][value] in device memory. by_value: whether rows are values.
    template <bool by_value, class Function>
    __device__ void for_each(Function function) const {
#pragma unroll
        for (int q = 0; q < kElements; ++q)
            if (has_row() && channel(q) < head_size)
                function(q, by_value ? channel(q) * head_size + slice + row : (slice + row) * head_size + channel(q));
    }
    template <bool by_value>
    __device__ void load_state(float (&to)[kElements], const float* from) const {
#pragma unroll
        for (int q = 0; q < kElements; ++q) to[q] = 0;
        if (from != nullptr) for_each<by_value>([&](int q, int at) { to[q] = from[at]; });
    }
    template <bool by_value>
    __device__ void store_state(float* to, const float (&from)[kElements]) const {
        for_each<by_value>([&](int q, int at) { to[at] = from[q]; });
    }

    // n tokens of the slice's rows, from shared memory to those from `to` on.
    template <class T>
    __device__ void write(T* to, int n, const float (&from)[kTokens][kRows]) const {
        const int token = threadIdx.x / (kRows / 4), quad = threadIdx.x % (kRows / 4) * 4;
        if (token < n && slice + quad < head_size) store(to + token * stride + slice + quad, load(&from[token][quad]));
    }
};

// kTokens tokens of a tensor [S, H, N] on their way to shared memory: kWidth channels of one head.
template <class T, int kWidth>
struct Staged {
    static constexpr int kQuads = kTokens * kWidth / 4;
    static constexpr int kTurns = (kQuads + kThreads - 1) / kThreads;
    Quad<T> quads[kTurns];

    // n tokens that begin at `from`; channels from `channel` on.
    template <int NP>
    __device__ void fetch(const Place<NP>& place, const T* from, int n, int channel = 0) {
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            const int x = turn * kThreads + threadIdx.x, token = x / (kWidth / 4), quad = channel + x % (kWidth / 4) * 4;
            quads[turn] = token < n && quad < place.head_size ? packed(from + token * place.stride + quad) : Quad<T>{};
        }
    }
    template <class Map>
    __device__ void put(float (&to)[kTokens][kWidth], Map map) const {
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            const int x = turn * kThreads + threadIdx.x;
            if (x < kQuads) store(&to[x / (kWidth / 4)][x % (kWidth / 4) * 4], map(widened(quads[turn])));
        }
    }
    __device__ void put(float (&to)[kTokens][kWidth]) const {
        put(to, [](Quad<float> x) { return x; });
    }
    __device__ void put_exp(float (&to)[kTokens][kWidth]) const {
        put(to, [](Quad<float> x) { return Quad<float>{expf(x.at[0]), expf(x.at[1]), expf(x.at[2]), expf(x.at[3])}; });
    }
};

__device__ inline float dot(const float (&x)[kElements], const float (&y)[kElements]) {
    float even = 0, odd = 0;
#pragma unroll
    for (int q = 0; q < kElements; q += 2) even += x[q] * y[q], odd += x[q + 1] * y[q + 1];
    return even + odd;
}

// Over a row, for all its lanes: always in the same order, so that a run repeats bit by bit.
template <int NP>
__device__ inline float total(float x) {
#pragma unroll
    for (int mask = 1; mask < Place<NP>::kLanes; mask *= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}

template <int NP>
dim3 grid(const Layout& layout, int n) {
    return dim3(n, layout.n_heads, (layout.head_size + Place<NP>::kRows - 1) / Place<NP>::kRows);
}

}  // namespace
