// WKV-5 forward and backward for CPUs, fp32 inside. The contract and the legend are in rwkv_dpo/kernels/wkv5/__init__.py.
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

#include "wkv_cpu.h"

#include <cmath>
#include <vector>

namespace {

// BLOCK comes from the command line.
template <class Head>
struct Kernel : Head {
    using typename Head::Vec;
    using typename Head::Row;
    using Head::LANES, Head::size, Head::load, Head::store, Head::dot, Head::multiply;

    const float* powers;  // [BLOCK + 1][n]: w^0, w^1, ...
    const float* u;       // [n]

    Kernel(const Head& head, const float* powers, const float* u) : Head(head), powers(powers), u(u) {}

    const float* power(int e) const { return powers + e * size(); }

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
        this->template advance<B, B, false, false>(state, power(B), faded_probe, faded_key, payload, out);
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
            this->template advance<B, B - 1, true, true>(grad.d_state, power(B), probe, payload, faded_key, d_out, state, slope);
        }
        for (int b = 0; b < B; b++) multiply(faded_key[b], key[b], power(B - 1 - b));
        this->template advance<B, B, true, false>(state, power(B), probe, payload, faded_key, out);
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

template <class Head>
void forward(const Head& head, const Call& c) {
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
            Kernel<Head>(head, powers.data() + h * (BLOCK + 1) * n, c.u + h * n)
                .sweep_over_keys(forwards(c.cu_seqlens, s), {rows(c.r), rows(c.k), rows(c.v)}, state, rows(c.y));
        }
    }
}

// Gradients of one level's tokens, and of the states that it begins from; those of its ends are complete.
template <class Head>
void backward_of_level(const Head& head, const Call& c, const std::vector<float>& powers, int first, int last, const float* g_ends) {
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
            const Kernel<Head> kernel(head, powers.data() + h * (BLOCK + 1) * n, c.u + h * n);
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

template <class Head>
void backward(const Head& head, const Call& c) {
    const auto powers = powers_of(c);
    const auto levels = levels_of(c);
    const int64_t square = int64_t(c.n_heads) * c.head_size * c.head_size;
    if (c.parents) {
        if (c.g_state_end) std::memcpy(c.g_end, c.g_state_end, sizeof(float) * c.n_seqs * square);
        else std::memset(c.g_end, 0, sizeof(float) * c.n_seqs * square);
    }
    for (size_t level = levels.size() - 1; level-- > 0;) {
        backward_of_level(head, c, powers, levels[level], levels[level + 1], c.parents ? c.g_end : c.g_state_end);
        for (int s = levels[level]; s < levels[level + 1]; s++)
            if (parent_of(c, s) >= 0)
                for (int64_t i = 0; i < square; i++) c.g_end[parent_of(c, s) * square + i] += c.g_start[s * square + i];
    }
    add_up(c);
}

}  // namespace

extern "C" void wkv5_forward(const Call* c) {
    with_head(c->head_size, [=](auto head) { forward(head, *c); });
}

extern "C" void wkv5_backward(const Call* c) {
    with_head(c->head_size, [=](auto head) { backward(head, *c); });
}
