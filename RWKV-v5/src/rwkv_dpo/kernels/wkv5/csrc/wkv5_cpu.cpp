// WKV-5 forward and backward for CPUs, fp32 inside. The contract and the legend are in rwkv_dpo/wkv/__init__.py.
//
// BLOCK tokens advance the state together, so that one pass over S serves BLOCK tokens:
//
//     S' = w^B S + sum_a (w^(B-1-a) k_a) v_a          y_b = (w^b r_b) S + sum_{a<b} <r_b w^(b-1-a), k_a> v_a + <r_b u, k_b> v_b
//
// Only powers w^0 .. w^B of the decay appear, never a quotient, so no decay can overflow.
// With G_t = dL/dS_t the backward is the same recurrence with the roles exchanged, G running from the last token to the first:
//
//     y  sums over keys:  probe r,  key k, payload v,  forwards          gv sums over keys:   probe k, key r, payload gy, backwards
//     gr sums over values: probe gy, key k, payload v, forwards          gk sums over values: probe v, key r, payload gy, backwards
//
// Vector lanes run over the index that is not summed: S is kept as [key][value] for sums over keys, as [value][key] otherwise.
// States are recomputed, never stored, and every sum has a fixed order: results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace {

// BLOCK comes from the command line.
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

enum Dtype { FP32, BF16, FP16 };

inline uint32_t bits_of(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }
inline float float_of(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }

inline float from_bf16(uint16_t x) { return float_of(uint32_t(x) << 16); }

inline uint16_t to_bf16(float x) {
    const uint32_t bits = bits_of(x);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    return is_nan ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
}

// IEEE half by hand: _Float16 is missing from GCC 11 and older on x86.
inline float from_fp16(uint16_t x) {
    const uint32_t sign = uint32_t(x & 0x8000) << 16, magnitude = uint32_t(x & 0x7fff) << 13;
    const uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);  // moves the exponent bias from 15 to 127
    return float_of(sign | (magnitude >= 0x0f800000 ? scaled | 0x7f800000 : scaled));
}

inline uint16_t to_fp16(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    // Adding 0.5 leaves a subnormal half in the last bits of the sum, rounded by the adder.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const uint32_t infinite_or_nan = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    return sign | (magnitude >= 0x47800000 ? infinite_or_nan : magnitude < 0x38800000 ? subnormal : normal);
}

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

// HEAD_SIZE 0 means known at run time only. TILE vectors of the state are in flight together.
template <int HEAD_SIZE, class Vec, int TILE>
struct Kernel {
    static constexpr int LANES = sizeof(Vec) / sizeof(float);
    static constexpr int W = HEAD_SIZE ? HEAD_SIZE : MAX_HEAD_SIZE;
    typedef float Row[W];

    const int n;
    const float* powers;  // [BLOCK + 1][n]: w^0, w^1, ...
    const float* u;       // [n]

    explicit Kernel(int head_size, const float* powers, const float* u)
        : n(HEAD_SIZE ? HEAD_SIZE : head_size), powers(powers), u(u) {}

    int size() const { return HEAD_SIZE ? HEAD_SIZE : n; }
    const float* power(int e) const { return powers + e * size(); }

    static Vec load(const float* p) { Vec x; std::memcpy(&x, p, sizeof x); return x; }
    static void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }

    // out_b[l] = sum_m probe_b[m] S[m][l]
    // S[m][l] <- decay S[m][l] + slope[l] source[m][l] + sum_{a < WRITES} row_a[m] lane_a[l]
    template <int B, int WRITES, bool DECAY_PER_LANE, bool HAS_SOURCE>
    void advance(float* state, const float* decay, const Row* probe, const Row* row, const Row* lane, Row* out,
                 const float* source = nullptr, const float* slope = nullptr) const {
        const int n = size();
        for (int l = 0; l < n; l += LANES * TILE) {
            Vec sum[B][TILE] = {}, write[WRITES ? WRITES : 1][TILE], lane_decay[TILE], lane_slope[TILE];
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

    struct Inputs { Rows probe, key, payload; };

    // out_b = sum over keys of probe_b S_b, bonus included, for B tokens.
    template <int B>
    void block_over_keys(int64_t token, int step, const Inputs& in, float* state, const Rows& result) const {
        const int n = size();
        alignas(64) Row probe[B], key[B], payload[B], faded_probe[B], faded_key[B], out[B];
        for (int b = 0; b < B; b++) {
            in.probe.load(token + b * step, n, probe[b]);
            in.key.load(token + b * step, n, key[b]);
            in.payload.load(token + b * step, n, payload[b]);
            multiply(faded_probe[b], probe[b], power(b));
            multiply(faded_key[b], key[b], power(B - 1 - b));
        }
        float score[B][B];
        for (int b = 0; b < B; b++)
            for (int a = 0; a <= b; a++) score[b][a] = dot(probe[b], key[a], a == b ? u : power(b - 1 - a));
        advance<B, B, false, false>(state, power(B), faded_probe, faded_key, payload, out);
        for (int b = 0; b < B; b++) {
            for (int j = 0; j < n; j += LANES) {
                Vec sum = load(out[b] + j);
                for (int a = 0; a <= b; a++) sum += score[b][a] * load(payload[a] + j);
                store(out[b] + j, sum);
            }
            result.store(token + b * step, n, out[b]);
        }
    }

    // What the gr sweep gathers on its way: D = dS/dw follows D <- w D + S.
    struct DecayGradient { Rows r; float* d_state; float* gw; float* gu; };

    // out_b = sum over values of probe_b S_b, bonus included, for B tokens; the state is [value][key].
    template <int B, bool WITH_DECAY_GRADIENT>
    void block_over_values(int64_t token, int step, const Inputs& in, float* state, const Rows& result,
                           const DecayGradient& grad) const {
        const int n = size();
        alignas(64) Row probe[B], key[B], payload[B], faded_key[B], out[B], d_out[B];
        for (int b = 0; b < B; b++) {
            in.probe.load(token + b * step, n, probe[b]);
            in.key.load(token + b * step, n, key[b]);
            in.payload.load(token + b * step, n, payload[b]);
        }
        float score[B][B];
        for (int b = 0; b < B; b++)
            for (int a = 0; a <= b; a++) score[b][a] = dot(payload[a], probe[b]);
        if (WITH_DECAY_GRADIENT) {
            // The block's step differentiated: D' = w^B D + B w^(B-1) S + sum_a (B-1-a) w^(B-2-a) k_a v_a, with the S before it.
            alignas(64) Row slope;
            for (int i = 0; i < n; i += LANES) {
                store(slope + i, float(B) * load(power(B - 1) + i));
                for (int a = 0; a < B - 1; a++)
                    store(faded_key[a] + i, float(B - 1 - a) * load(power(B - 2 - a) + i) * load(key[a] + i));
            }
            advance<B, B - 1, true, true>(grad.d_state, power(B), probe, payload, faded_key, d_out, state, slope);
        }
        for (int b = 0; b < B; b++) multiply(faded_key[b], key[b], power(B - 1 - b));
        advance<B, B, true, false>(state, power(B), probe, payload, faded_key, out);
        for (int b = 0; b < B; b++) {
            alignas(64) Row r;
            if (WITH_DECAY_GRADIENT) grad.r.load(token + b * step, n, r);
            for (int i = 0; i < n; i += LANES) {
                const Vec from_state = load(out[b] + i), bonus = score[b][b] * load(key[b] + i);
                Vec sum = load(power(b) + i) * from_state + load(u + i) * bonus;
                for (int a = 0; a < b; a++) sum += score[b][a] * load(power(b - 1 - a) + i) * load(key[a] + i);
                store(out[b] + i, sum);
                if (!WITH_DECAY_GRADIENT) continue;
                Vec d_sum = load(power(b) + i) * load(d_out[b] + i);
                if (b > 0) d_sum += float(b) * load(power(b - 1) + i) * from_state;
                for (int a = 0; a < b - 1; a++)
                    d_sum += float(b - 1 - a) * score[b][a] * load(power(b - 2 - a) + i) * load(key[a] + i);
                store(grad.gw + i, load(grad.gw + i) + load(r + i) * d_sum);
                store(grad.gu + i, load(grad.gu + i) + load(r + i) * bonus);
            }
            result.store(token + b * step, n, out[b]);
        }
    }

    void sweep_over_keys(Span span, const Inputs& in, float* state, const Rows& result) const {
        auto [token, count, step] = span;
        for (; count >= BLOCK; count -= BLOCK, token += BLOCK * step) block_over_keys<BLOCK>(token, step, in, state, result);
        for (; count > 0; count--, token += step) block_over_keys<1>(token, step, in, state, result);
    }

    template <bool WITH_DECAY_GRADIENT>
    void sweep_over_values(Span span, const Inputs& in, float* state, const Rows& result, const DecayGradient& grad) const {
        auto [token, count, step] = span;
        for (; count >= BLOCK; count -= BLOCK, token += BLOCK * step)
            block_over_values<BLOCK, WITH_DECAY_GRADIENT>(token, step, in, state, result, grad);
        for (; count > 0; count--, token += step)
            block_over_values<1, WITH_DECAY_GRADIENT>(token, step, in, state, result, grad);
    }
};

void start_state(float* state, const float* from, int n) {
    if (from) std::memcpy(state, from, sizeof(float) * n * n);
    else std::memset(state, 0, sizeof(float) * n * n);
}

void start_state_transposed(float* state, const float* from, int n) {
    for (int j = 0; j < n; j++)
        for (int i = 0; i < n; i++) state[j * n + i] = from ? from[i * n + j] : 0.0f;
}

}  // namespace

// Mirrored field by field in cpu.py. Pointers may be null where it says so.
struct Call {
    int32_t n_threads, n_seqs, n_heads, head_size, dtype;
    const int32_t* cu_seqlens;     // [n_seqs + 1]
    const int32_t* parents;        // [n_seqs] whose end each begins from, -1 for state0's; in the order of their depth; null for all -1
    const void *r, *k, *v;         // [tokens, n_heads, head_size] in dtype, like y, gy, gr, gk and gv
    const float* time_decay;       // [n_heads, head_size]
    const float* u;                // [n_heads, head_size]
    const float* state0;           // [sequences without a parent, n_heads, head_size, head_size], null for zeros
    void* y;
    float* state_end;              // [n_seqs, n_heads, head_size, head_size]; the backward reads it where there are parents
    const void* gy;
    const float* g_state_end;      // like state_end, null for zeros
    void *gr, *gk, *gv;
    float *g_time_decay, *gu;      // like time_decay
    float* sums;                   // [2, n_seqs, n_heads, head_size]: what each sequence adds to the gradients of w and u
    float* g_start;                // like state_end: of the states that sequences begin from; null if not wanted and without parents
    float* g_end;                  // like state_end: of their ends, children's shares included; null without parents
};

namespace {

struct Scratch { alignas(64) float state[MAX_HEAD_SIZE * MAX_HEAD_SIZE], d_state[MAX_HEAD_SIZE * MAX_HEAD_SIZE]; };

// exp(time_decay); bounded, since beyond 6.7 w and its gradient are 0 in double too.
inline double rate_of(float time_decay) { return std::exp(std::min(double(time_decay), 10.0)); }

// w^0 .. w^BLOCK of every head, [n_heads, BLOCK + 1, head_size]; rounded once from double, as w itself is too near 1 for its powers to
// be exact.
std::vector<float> powers_of(const Call& c) {
    const int n = c.head_size;
    std::vector<float> powers(size_t(c.n_heads) * (BLOCK + 1) * n);
    for (int h = 0; h < c.n_heads; h++)
        for (int e = 0; e <= BLOCK; e++)
            for (int i = 0; i < n; i++) powers[(size_t(h) * (BLOCK + 1) + e) * n + i] = std::exp(-rate_of(c.time_decay[h * n + i]) * e);
    return powers;
}

inline int parent_of(const Call& c, int s) { return c.parents ? c.parents[s] : -1; }

// Sequences whose parents are done: each level's first, and the end.
std::vector<int> levels_of(const Call& c) {
    std::vector<int> depths(c.n_seqs), firsts{0};
    for (int s = 0; s < c.n_seqs; s++) {
        depths[s] = parent_of(c, s) < 0 ? 0 : depths[parent_of(c, s)] + 1;
        if (s > 0 && depths[s] != depths[s - 1]) firsts.push_back(s);
    }
    firsts.push_back(c.n_seqs);
    return firsts;
}

// Where a sequence begins, for one head; null for zero.
inline const float* start_of(const Call& c, int s, int h) {
    const int64_t square = int64_t(c.head_size) * c.head_size;
    if (parent_of(c, s) >= 0) return c.state_end + (int64_t(parent_of(c, s)) * c.n_heads + h) * square;
    return c.state0 ? c.state0 + (int64_t(s) * c.n_heads + h) * square : nullptr;
}

template <class K>
void forward(const Call& c) {
    const int n = c.head_size;
    const auto powers = powers_of(c);
    const auto levels = levels_of(c);
    for (size_t level = 0; level + 1 < levels.size(); level++) {
#pragma omp parallel for schedule(dynamic) num_threads(c.n_threads)
        for (int item = levels[level] * c.n_heads; item < levels[level + 1] * c.n_heads; item++) {
            const int s = item / c.n_heads, h = item % c.n_heads;
            const auto rows = [&](const void* tensor) { return Rows(tensor, c.dtype, h, c.n_heads, n); };
            float* state = c.state_end + int64_t(item) * n * n;
            start_state(state, start_of(c, s, h), n);
            K(n, powers.data() + h * (BLOCK + 1) * n, c.u + h * n)
                .sweep_over_keys(forwards(c.cu_seqlens, s), {rows(c.r), rows(c.k), rows(c.v)}, state, rows(c.y));
        }
    }
}

// Gradients of one level's tokens, and of the states that it begins from; those of its ends are complete.
template <class K>
void backward_of_level(const Call& c, const std::vector<float>& powers, int first, int last, const float* g_ends) {
    const int n = c.head_size, n_items = (last - first) * c.n_heads;
    const int64_t all = int64_t(c.n_seqs) * c.n_heads * n;
#pragma omp parallel num_threads(c.n_threads)
    {
        const std::unique_ptr<Scratch> scratch(new Scratch);  // whose 128 kB make_unique would fill with zeros
        // Three independent sweeps per sequence and head; the longest ones start first.
#pragma omp for schedule(dynamic)
        for (int task = 0; task < 3 * n_items; task++) {
            const int item = first * c.n_heads + task % n_items, s = item / c.n_heads, h = item % c.n_heads;
            const auto rows = [&](const void* tensor) { return Rows(tensor, c.dtype, h, c.n_heads, n); };
            const int64_t at = int64_t(item) * n * n;
            const float* g_state_end = g_ends ? g_ends + at : nullptr;
            const K kernel(n, powers.data() + h * (BLOCK + 1) * n, c.u + h * n);
            if (task < n_items) {
                float *gw = c.sums + int64_t(item) * n, *gu = gw + all;
                std::memset(gw, 0, sizeof(float) * n);
                std::memset(gu, 0, sizeof(float) * n);
                start_state_transposed(scratch->state, start_of(c, s, h), n);
                start_state(scratch->d_state, nullptr, n);
                kernel.template sweep_over_values<true>(forwards(c.cu_seqlens, s), {rows(c.gy), rows(c.k), rows(c.v)},
                                                        scratch->state, rows(c.gr), {rows(c.r), scratch->d_state, gw, gu});
                if (g_state_end)
                    for (int j = 0; j < n; j++)
                        for (int i = 0; i < n; i++) gw[i] += scratch->d_state[j * n + i] * g_state_end[i * n + j];
            } else if (task < 2 * n_items) {
                start_state_transposed(scratch->state, g_state_end, n);
                kernel.template sweep_over_values<false>(backwards(c.cu_seqlens, s), {rows(c.v), rows(c.r), rows(c.gy)},
                                                         scratch->state, rows(c.gk), {rows(c.r), nullptr, nullptr, nullptr});
            } else {
                float* g_state = c.g_start ? c.g_start + at : scratch->state;
                start_state(g_state, g_state_end, n);
                kernel.sweep_over_keys(backwards(c.cu_seqlens, s), {rows(c.k), rows(c.r), rows(c.gy)}, g_state, rows(c.gv));
            }
        }
    }
}

// What sequences add to the gradients of w and u, in their order; w = exp(-rate), so dw / d time_decay = -rate w.
void add_up(const Call& c) {
    const int64_t width = int64_t(c.n_heads) * c.head_size;
    for (int64_t i = 0; i < width; i++) {
        double gw = 0, gu = 0;
        for (int s = 0; s < c.n_seqs; s++) {
            gw += c.sums[s * width + i];
            gu += c.sums[(c.n_seqs + s) * width + i];
        }
        const double rate = rate_of(c.time_decay[i]);
        c.g_time_decay[i] = float(gw * -rate * std::exp(-rate));
        c.gu[i] = float(gu);
    }
}

template <class K>
void backward(const Call& c) {
    const auto powers = powers_of(c);
    const auto levels = levels_of(c);
    const int64_t square = int64_t(c.n_heads) * c.head_size * c.head_size;
    if (c.parents) {
        if (c.g_state_end) std::memcpy(c.g_end, c.g_state_end, sizeof(float) * c.n_seqs * square);
        else std::memset(c.g_end, 0, sizeof(float) * c.n_seqs * square);
    }
    for (size_t level = levels.size() - 1; level-- > 0;) {
        backward_of_level<K>(c, powers, levels[level], levels[level + 1], c.parents ? c.g_end : c.g_state_end);
        for (int s = levels[level]; s < levels[level + 1]; s++)
            if (parent_of(c, s) >= 0)
                for (int64_t i = 0; i < square; i++) c.g_end[parent_of(c, s) * square + i] += c.g_start[s * square + i];
    }
    add_up(c);
}

}  // namespace

// Sizes other than the usual three share a kernel that is two to three times slower per multiplication.
extern "C" void wkv5_forward(const Call* c) {
    switch (c->head_size) {
        case 32: return forward<Kernel<32, Wide, 2>>(*c);
        case 64: return forward<Kernel<64, Wide, 2>>(*c);
        case 128: return forward<Kernel<128, Wide, 2>>(*c);
        default: return forward<Kernel<0, Narrow, 1>>(*c);
    }
}

extern "C" void wkv5_backward(const Call* c) {
    switch (c->head_size) {
        case 32: return backward<Kernel<32, Wide, 2>>(*c);
        case 64: return backward<Kernel<64, Wide, 2>>(*c);
        case 128: return backward<Kernel<128, Wide, 2>>(*c);
        default: return backward<Kernel<0, Narrow, 1>>(*c);
    }
}
