// WKV-6 forward and backward for CPUs, fp32 inside. The contract and the legend are in rwkv_dpo/kernels/wkv6/__init__.py.
//
// BLOCK tokens advance the state together, so that one pass over S serves BLOCK tokens. With w(a, b) the product of the decays of
// tokens a .. b-1, always a product and never a quotient, so that no decay can overflow:
//
//     S' = w(0, B) S + sum_a (w(a+1, B) k_a) v_a      y_b = (w(0, b) r_b) S + sum_{a<b} <r_b w(a+1, b), k_a> v_a + <r_b u, k_b> v_b
//
// With G_t = dL/dS_t the backward is the same recurrence with the roles exchanged, G running from the last token to the first:
//
//     y  sums over keys:  probe r,  key k, payload v,  forwards          gv sums over keys:   probe k, key r, payload gy, backwards
//     gr sums over values: probe gy, key k, payload v, forwards          gk sums over values: probe v, key r, payload gy, backwards
//
// The gradient of log w_t sums, over whatever passes token t: what later tokens of the block read of the state before it (READ), what
// earlier ones write to the state after it (WROTE), what both exchange, and what goes through the whole block. Nothing is subtracted:
// a fast decay's tiny gradient is as exact as any other. It takes both S and G at every block: S is kept at every SEGMENT tokens and
// replayed from there.
//
// Vector lanes run over the index that is not summed: S is kept as [key][value] for sums over keys, as [value][key] otherwise.
// Every sum has a fixed order: results do not depend on the number of threads.

#include "wkv_cpu.h"

namespace {

constexpr int BLOCK = 4, SEGMENT = 32;

template <class Head>
struct Kernel : Head {
    using typename Head::Vec;
    using typename Head::Row;
    using Head::LANES, Head::W, Head::size, Head::load, Head::store, Head::dot, Head::multiply;

    const float* u;  // [n]
    Rows w;          // fp32

    Kernel(const Head& head, const float* u, Rows w) : Head(head), u(u), w(w) {}

    struct Inputs { Rows probe, key, payload; };

    // The decays of B tokens, in the order of the sweep: of token b, of those before it, of those after it; between(a, b), those
    // between two tokens that are not neighbours.
    template <int B>
    struct Decays {
        alignas(64) Row own[B], before[B], after[B], whole, twos[B];

        Decays(const Kernel& kernel, int64_t token, int step) {
            const int n = kernel.size();
            for (int b = 0; b < B; b++) kernel.w.load(token + b * step, n, own[b]);
            for (int i = 0; i < n; i += LANES) {
                Vec product = load(own[0] + i);
                for (int b = 1; b < B; b++) store(before[b] + i, product), product *= load(own[b] + i);
                store(whole + i, product);
                product = load(own[B - 1] + i);
                for (int b = B - 2; b >= 0; b--) store(after[b] + i, product), product *= load(own[b] + i);
                for (int b = 1; b < B - 2; b++) store(twos[b] + i, load(own[b] + i) * load(own[b + 1] + i));
            }
        }
        const float* between(int a, int b) const { return b - a == 2 ? own[a + 1] : twos[a + 1]; }
    };

    template <int B>
    void load_block(int64_t token, int step, const Inputs& in, Row* probe, Row* key, Row* payload) const {
        for (int b = 0; b < B; b++) {
            in.probe.load(token + b * step, size(), probe[b]);
            in.key.load(token + b * step, size(), key[b]);
            in.payload.load(token + b * step, size(), payload[b]);
        }
    }

    // out_b = sum over keys of probe_b S_b, bonus included, for B tokens.
    template <int B>
    void block_over_keys(int64_t token, int step, const Inputs& in, float* state, const Rows& result) const {
        static_assert(B <= 4, "Decays::between knows two decays at most");
        const int n = size();
        alignas(64) Row probe[B], key[B], payload[B], faded[B], out[B];
        load_block<B>(token, step, in, probe, key, payload);
        const Decays<B> decays(*this, token, step);
        float score[B][B];
        for (int b = 0; b < B; b++) {
            score[b][b] = dot(probe[b], key[b], u);
            if (b > 0) score[b][b - 1] = dot(probe[b], key[b - 1]);
            for (int a = 0; a < b - 1; a++) score[b][a] = dot(probe[b], key[a], decays.between(a, b));
        }
        for (int b = 1; b < B; b++) multiply(probe[b], probe[b], decays.before[b]);
        for (int b = 0; b < B - 1; b++) multiply(faded[b], key[b], decays.after[b]);
        std::memcpy(faded[B - 1], key[B - 1], n * sizeof(float));
        this->template advance<B, B, false, false>(state, decays.whole, probe, faded, payload, out);
        for (int b = 0; b < B; b++) {
            for (int j = 0; j < n; j += LANES) {
                Vec sum = load(out[b] + j);
                for (int a = 0; a <= b; a++) sum += score[b][a] * load(payload[a] + j);
                store(out[b] + j, sum);
            }
            result.store(token + b * step, n, out[b]);
        }
    }

    // out_b = sum over values of probe_b S_b, bonus included, for B tokens; the state is [value][key]. from_state_b: the state's part.
    template <int B>
    void block_over_values(int64_t token, int step, const Inputs& in, float* state, const Rows& result, Row* from_state) const {
        const int n = size();
        alignas(64) Row probe[B], key[B], payload[B], faded[B], out[B];
        load_block<B>(token, step, in, probe, key, payload);
        const Decays<B> decays(*this, token, step);
        float score[B][B];
        for (int b = 0; b < B; b++)
            for (int a = 0; a <= b; a++) score[b][a] = dot(payload[a], probe[b]);
        for (int b = 0; b < B - 1; b++) multiply(faded[b], key[b], decays.after[b]);
        std::memcpy(faded[B - 1], key[B - 1], n * sizeof(float));
        this->template advance<B, B, true, false>(state, decays.whole, probe, payload, faded, from_state);
        for (int b = 0; b < B; b++) {
            for (int i = 0; i < n; i += LANES) {
                Vec sum = load(from_state[b] + i);
                if (b > 0) store(from_state[b] + i, sum *= load(decays.before[b] + i));
                sum += load(u + i) * (score[b][b] * load(key[b] + i));
                if (b > 0) sum += score[b][b - 1] * load(key[b - 1] + i);
                for (int a = 0; a < b - 1; a++) sum += load(decays.between(a, b) + i) * (score[b][a] * load(key[a] + i));
                store(out[b] + i, sum);
            }
            result.store(token + b * step, n, out[b]);
        }
    }

    void sweep_over_keys(Span span, const Inputs& in, float* state, const Rows& result) const {
        auto [token, count, step] = span;
        for (; count >= BLOCK; count -= BLOCK, token += BLOCK * step) block_over_keys<BLOCK>(token, step, in, state, result);
        for (; count > 0; count--, token += step) block_over_keys<1>(token, step, in, state, result);
    }

    // The state B tokens later; [value][key].
    template <int B>
    void write_block(int64_t token, const Rows& k, const Rows& v, float* state) const {
        alignas(64) Row key[B], value[B];
        for (int b = 0; b < B; b++) k.load(token + b, size(), key[b]), v.load(token + b, size(), value[b]);
        const Decays<B> decays(*this, token, 1);
        for (int b = 0; b < B - 1; b++) multiply(key[b], key[b], decays.after[b]);
        this->template advance<0, B, true, false>(state, decays.whole, nullptr, value, key, nullptr);
    }
    void write(int64_t token, int count, const Rows& k, const Rows& v, float* state) const {
        for (; count >= BLOCK; count -= BLOCK, token += BLOCK) write_block<BLOCK>(token, k, v, state);
        for (; count > 0; count--, token++) write_block<1>(token, k, v, state);
    }

    struct Gradients { Rows r, k, v, gy, gr, gk, g_log_w; float* gu; };

    // Of B tokens from `token` on: gk, g_log_w and what they add to gu. `start` is S before them, `read` what each reads of it; g_state,
    // G after them, becomes G before them. All of it [value][key].
    template <int B>
    void gradients(int64_t token, const Gradients& g, const float* start, const Row* read, float* g_state) const {
        const int n = size();
        alignas(64) Row through, from_state[B], r[B], k[B], v[B], gy[B], g_log_w[B];
        for (int i = 0; i < n; i += LANES) {
            Vec even = {}, odd = {};
            for (int j = 0; j < n; j += 2) {
                even += load(start + j * n + i) * load(g_state + j * n + i);
                odd += load(start + (j + 1) * n + i) * load(g_state + (j + 1) * n + i);
            }
            store(through + i, even + odd);
        }
        block_over_values<B>(token + B - 1, -1, {g.v, g.r, g.gy}, g_state, g.gk, from_state);
        load_block<B>(token, 1, {g.r, g.k, g.v}, r, k, v);
        for (int b = 0; b < B; b++) g.gy.load(token + b, n, gy[b]);
        const Decays<B> decays(*this, token, 1);
        for (int b = 0; b < B; b++) {
            const float bonus = dot(v[b], gy[b]);
            for (int i = 0; i < n; i += LANES) store(g.gu + i, load(g.gu + i) + bonus * load(r[b] + i) * load(k[b] + i));
        }
        float score[B][B];
        for (int b = 2; b < B; b++)
            for (int a = 0; a < b - 1; a++) score[b][a] = dot(v[a], gy[b]);
        for (int i = 0; i < n; i += LANES) {
            Vec sum[B], passing = load(decays.whole + i) * load(through + i);
            // What token b reads of the state passes all before it, what it writes to the state all after it.
            for (int b = B - 1; b >= 0; b--) sum[b] = passing, passing += load(r[b] + i) * load(read[b] + i);
            passing = Vec{};
            for (int b = 0; b < B; b++) sum[b] += passing, passing += load(k[b] + i) * load(from_state[B - 1 - b] + i);
            for (int b = 2; b < B; b++)
                for (int a = 0; a < b - 1; a++) {
                    const Vec pair = score[b][a] * load(k[a] + i) * load(r[b] + i) * load(decays.between(a, b) + i);
                    for (int t = a + 1; t < b; t++) sum[t] += pair;
                }
            for (int b = 0; b < B; b++) store(g_log_w[b] + i, sum[b]);
        }
        for (int b = 0; b < B; b++) g.g_log_w.store(token + b, n, g_log_w[b]);
    }

    // A segment's states before each block, which are BLOCK tokens and in the end single ones, and what each token reads of them.
    struct Replay { alignas(64) float state[SEGMENT / BLOCK + BLOCK - 1][W * W]; alignas(64) Row read[SEGMENT]; };

    // gr, gk, g_log_w and gu of at most SEGMENT tokens, `state` being S before them and g_state G after them, which becomes G before.
    void segment(int64_t token, int count, const Gradients& g, float* state, float* g_state, Replay& replay) const {
        const Inputs forwards{g.gy, g.k, g.v};
        const int in_blocks = count / BLOCK * BLOCK;
        int t = 0, slot = 0;
        const auto keep = [&] { std::memcpy(replay.state[slot++], state, sizeof(float) * size() * size()); };
        for (; t < in_blocks; t += BLOCK) keep(), block_over_values<BLOCK>(token + t, 1, forwards, state, g.gr, replay.read + t);
        for (; t < count; t++) keep(), block_over_values<1>(token + t, 1, forwards, state, g.gr, replay.read + t);
        while (t > in_blocks) t--, gradients<1>(token + t, g, replay.state[--slot], replay.read + t, g_state);
        while (t > 0) t -= BLOCK, gradients<BLOCK>(token + t, g, replay.state[--slot], replay.read + t, g_state);
    }
};

}  // namespace

// Mirrored field by field in kernels/wkv6/cpu.py. Pointers may be null where it says so.
struct Call {
    int32_t n_threads, n_seqs, n_heads, head_size, dtype;
    const int32_t* cu_seqlens;     // [n_seqs + 1]
    const void *r, *k, *v;         // [tokens, n_heads, head_size] in dtype, like y, gy, gr, gk and gv
    const float* w;                // [tokens, n_heads, head_size], like g_log_w
    const float* u;                // [n_heads, head_size]
    const float* state0;           // [n_seqs, n_heads, head_size, head_size], null for zeros
    void* y;
    float* state_end;              // like state0
    const void* gy;
    const float* g_state_end;      // null for zeros
    void *gr, *gk, *gv;
    float* g_log_w;
    float* gu;                     // [n_seqs, n_heads, head_size]: the caller adds up the sequences
    float* g_state0;               // null if not wanted
};

namespace {

template <class Head>
void forward(const Head& head, const Call& c) {
    const int n = c.head_size;
#pragma omp parallel for schedule(dynamic) num_threads(c.n_threads)
    for (int item = 0; item < c.n_seqs * c.n_heads; item++) {
        const int s = item / c.n_heads, h = item % c.n_heads;
        const auto rows = [&](const void* tensor, int dtype) { return Rows(tensor, dtype, h, c.n_heads, n); };
        const int64_t at = int64_t(item) * n * n;
        start_state(c.state_end + at, c.state0 ? c.state0 + at : nullptr, n);
        Kernel<Head>(head, c.u + h * n, rows(c.w, FP32))
            .sweep_over_keys(forwards(c.cu_seqlens, s), {rows(c.r, c.dtype), rows(c.k, c.dtype), rows(c.v, c.dtype)}, c.state_end + at,
                             rows(c.y, c.dtype));
    }
}

template <class Head>
void backward(const Head& head, const Call& c) {
    typedef Kernel<Head> K;
    const int n = c.head_size, n_items = c.n_seqs * c.n_heads;
    int longest = 0;
    for (int s = 0; s < c.n_seqs; s++) longest = std::max(longest, c.cu_seqlens[s + 1] - c.cu_seqlens[s]);
    const int n_segments = (longest + SEGMENT - 1) / SEGMENT;
#pragma omp parallel num_threads(c.n_threads)
    {
        const auto kept = std::make_unique<float[]>(size_t(n_segments + 1) * n * n);
        const auto replay = std::make_unique<typename K::Replay>();
        alignas(64) float state[MAX_HEAD_SIZE * MAX_HEAD_SIZE], g_state[MAX_HEAD_SIZE * MAX_HEAD_SIZE];
        // Two independent sweeps per sequence and head; the longest ones start first.
#pragma omp for schedule(dynamic)
        for (int task = 0; task < 2 * n_items; task++) {
            const int item = task % n_items, s = item / c.n_heads, h = item % c.n_heads;
            const auto rows = [&](const void* tensor) { return Rows(tensor, c.dtype, h, c.n_heads, n); };
            const int64_t at = int64_t(item) * n * n;
            const float* g_state_end = c.g_state_end ? c.g_state_end + at : nullptr;
            const K kernel(head, c.u + h * n, Rows(c.w, FP32, h, c.n_heads, n));
            const Rows r = rows(c.r), k = rows(c.k), v = rows(c.v), gy = rows(c.gy);
            if (task >= n_items) {
                float* end = c.g_state0 ? c.g_state0 + at : g_state;
                start_state(end, g_state_end, n);
                kernel.sweep_over_keys(backwards(c.cu_seqlens, s), {k, r, gy}, end, rows(c.gv));
                continue;
            }
            const auto [first, count, step] = forwards(c.cu_seqlens, s);
            float* gu = c.gu + int64_t(item) * n;
            std::memset(gu, 0, sizeof(float) * n);
            const typename K::Gradients g{r, k, v, gy, rows(c.gr), rows(c.gk), Rows(c.g_log_w, FP32, h, c.n_heads, n), gu};
            start_state_transposed(state, c.state0 ? c.state0 + at : nullptr, n);
            start_state_transposed(g_state, g_state_end, n);
            int segment = 0;
            for (; (segment + 1) * SEGMENT < count; segment++) {
                std::memcpy(kept.get() + size_t(segment) * n * n, state, sizeof(float) * n * n);
                kernel.write(first + segment * SEGMENT, SEGMENT, k, v, state);
            }
            for (; segment >= 0; segment--) {
                kernel.segment(first + segment * SEGMENT, std::min(SEGMENT, count - segment * SEGMENT), g, state, g_state, *replay);
                if (segment > 0) std::memcpy(state, kept.get() + size_t(segment - 1) * n * n, sizeof(float) * n * n);
            }
        }
    }
}

}  // namespace

extern "C" void wkv6_forward(const Call* c) {
    with_head(c->head_size, [=](auto head) { forward(head, *c); });
}

extern "C" void wkv6_backward(const Call* c) {
    with_head(c->head_size, [=](auto head) { backward(head, *c); });
}
