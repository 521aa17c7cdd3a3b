// What the recurrences for CPUs share: vectors of the machine's width, rows of 16-bit or 32-bit numbers, states, head sizes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "floats.h"

namespace {

constexpr int MAX_HEAD_SIZE = 128;

typedef float Vec4 __attribute__((vector_size(16)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec16 __attribute__((vector_size(64)));
// Wide is the machine's register. Narrow has at most 8 lanes, since head sizes are multiples of 8.
#if defined(__AVX512F__)
typedef Vec16 Wide;
typedef Vec8 Narrow;
#elif defined(__AVX__)
typedef Vec8 Wide;
typedef Vec8 Narrow;
#else
typedef Vec4 Wide;
typedef Vec4 Narrow;
#endif

// Halving, not one lane after the other: a chain of 16 dependent additions would cost a tenth of the kernel's time.
inline float sum_of(Vec4 x) { return (x[0] + x[1]) + (x[2] + x[3]); }
inline float sum_of(Vec8 x) { Vec4 half[2]; std::memcpy(half, &x, sizeof x); return sum_of(half[0] + half[1]); }
inline float sum_of(Vec16 x) { Vec8 half[2]; std::memcpy(half, &x, sizeof x); return sum_of(half[0] + half[1]); }

// The rows of one head in a [tokens, heads, head_size] tensor.
struct Rows {
    char* base;
    int64_t stride;  // bytes from token to token
    int dtype;

    Rows(const void* tensor, int dtype, int head, int n_heads, int n) : dtype(dtype) {
        const int64_t size = dtype == FP32 ? 4 : 2;
        base = static_cast<char*>(const_cast<void*>(tensor)) + size * head * n;
        stride = size * n_heads * n;
    }
    void load(int64_t token, int n, float* x) const {
        const void* row = base + token * stride;
        const auto* half = static_cast<const uint16_t*>(row);
        if (dtype == FP32) std::memcpy(x, row, n * sizeof(float));
        else if (dtype == BF16) for (int i = 0; i < n; i++) x[i] = from_bf16(half[i]);
        else for (int i = 0; i < n; i++) x[i] = from_fp16(half[i]);
    }
    void store(int64_t token, int n, const float* x) const {
        void* row = base + token * stride;
        auto* half = static_cast<uint16_t*>(row);
        if (dtype == FP32) std::memcpy(row, x, n * sizeof(float));
        else if (dtype == BF16) for (int i = 0; i < n; i++) half[i] = to_bf16(x[i]);
        else for (int i = 0; i < n; i++) half[i] = to_fp16(x[i]);
    }
};

struct Span { int64_t first; int count; int step; };  // tokens first, first + step, ... ; step is 1 or -1

inline Span forwards(const int32_t* cu, int s) { return {cu[s], cu[s + 1] - cu[s], 1}; }
inline Span backwards(const int32_t* cu, int s) { return {int64_t(cu[s + 1]) - 1, cu[s + 1] - cu[s], -1}; }

// A head's rows and state. SIZE 0 means known at run time only. TILE vectors of the state are in flight together.
template <int SIZE, class V, int T>
struct Head {
    typedef V Vec;
    static constexpr int HEAD_SIZE = SIZE, TILE = T;
    static constexpr int LANES = sizeof(Vec) / sizeof(float);
    static constexpr int W = HEAD_SIZE ? HEAD_SIZE : MAX_HEAD_SIZE;
    typedef float Row[W];

    const int n;

    explicit Head(int head_size) : n(HEAD_SIZE ? HEAD_SIZE : head_size) {}
    int size() const { return HEAD_SIZE ? HEAD_SIZE : n; }

    static Vec load(const float* p) { Vec x; std::memcpy(&x, p, sizeof x); return x; }
    static void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }

    // out_b[l] = sum_m probe_b[m] S[m][l]
    // S[m][l] <- decay S[m][l] + slope[l] source[m][l] + sum_{a < WRITES} row_a[m] lane_a[l]
    template <int B, int WRITES, bool DECAY_PER_LANE, bool HAS_SOURCE>
    void advance(float* state, const float* decay, const Row* probe, const Row* row, const Row* lane, Row* out,
                 const float* source = nullptr, const float* slope = nullptr) const {
        const int n = size();
        for (int l = 0; l < n; l += LANES * TILE) {
            Vec sum[B ? B : 1][TILE] = {}, write[WRITES ? WRITES : 1][TILE], lane_decay[TILE], lane_slope[TILE];
            for (int i = 0; i < TILE; i++) {
                for (int a = 0; a < WRITES; a++) write[a][i] = load(lane[a] + l + i * LANES);
                if (DECAY_PER_LANE) lane_decay[i] = load(decay + l + i * LANES);
                if (HAS_SOURCE) lane_slope[i] = load(slope + l + i * LANES);
            }
            for (int m = 0; m < n; m++) {
                for (int i = 0; i < TILE; i++) {
                    const int at = m * n + l + i * LANES;
                    Vec s = load(state + at);
                    for (int b = 0; b < B; b++) sum[b][i] += probe[b][m] * s;
                    if (DECAY_PER_LANE) s *= lane_decay[i];
                    else s *= decay[m];
                    if (HAS_SOURCE) s += lane_slope[i] * load(source + at);
                    for (int a = 0; a < WRITES; a++) s += row[a][m] * write[a][i];
                    store(state + at, s);
                }
            }
            for (int b = 0; b < B; b++)
                for (int i = 0; i < TILE; i++) store(out[b] + l + i * LANES, sum[b][i]);
        }
    }

    float dot(const float* x, const float* y) const {
        Vec sum = {};
        for (int i = 0; i < size(); i += LANES) sum += load(x + i) * load(y + i);
        return sum_of(sum);
    }
    float dot(const float* x, const float* y, const float* weight) const {
        Vec sum = {};
        for (int i = 0; i < size(); i += LANES) sum += load(x + i) * load(weight + i) * load(y + i);
        return sum_of(sum);
    }
    void multiply(float* out, const float* x, const float* y) const {
        for (int i = 0; i < size(); i += LANES) store(out + i, load(x + i) * load(y + i));
    }
};

inline void start_state(float* state, const float* from, int n) {
    if (from) std::memcpy(state, from, sizeof(float) * n * n);
    else std::memset(state, 0, sizeof(float) * n * n);
}

// In squares of 8, which the cache holds.
inline void transpose(float* to, const float* from, int n) {
    for (int j = 0; j < n; j += 8)
        for (int i = 0; i < n; i += 8)
            for (int jj = j; jj < j + 8; jj++)
                for (int ii = i; ii < i + 8; ii++) to[jj * n + ii] = from[ii * n + jj];
}

inline void start_state_transposed(float* state, const float* from, int n) {
    if (from) transpose(state, from, n);
    else std::memset(state, 0, sizeof(float) * n * n);
}

// Calls run with the Head of a size, whose type is that size's. Sizes other than the usual three share code that is two to three times
// slower per multiplication.
template <class Run>
void with_head(int head_size, const Run& run) {
    switch (head_size) {
        case 32: return run(Head<32, Wide, 2>(head_size));
        case 64: return run(Head<64, Wide, 2>(head_size));
        case 128: return run(Head<128, Wide, 2>(head_size));
        default: return run(Head<0, Narrow, 1>(head_size));
    }
}

}  // namespace
