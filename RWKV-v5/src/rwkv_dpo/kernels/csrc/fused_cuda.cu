// What a block does between its matrix products, on NVIDIA GPUs. The contract is in rwkv_dpo/kernels/fused/__init__.py, the same functions
// for CPUs, written to be read first, in fused_cpu.cpp.
//
// A thread block takes a strip of rows, one after the other, and a thread four neighbouring channels of each: norms of a row are sums over
// the block, and what parameters gather over rows stays in registers until the strip ends. Strips add up in their order: no atomics, so
// that a run repeats bit by bit. Everything is bound by memory; a row is read again where that is the neighbours' business only.
#include "driver.cuh"
#include "fused_calls.h"
#include "quads.cuh"

namespace {

constexpr int kMixes = 8;          // at most
constexpr int kThreads = 256;      // of elementwise functions and sums
constexpr int kFewThreads = 256;   // rows of up to 1024 channels may use all registers
// Of wider rows: with more threads, fp32 would spill.
template <class T>
constexpr int kManyThreads = sizeof(T) == 4 ? 768 : 1024;
// On a multiprocessor at once: what the compiler is told, which would otherwise spill a register for the sake of more.
template <int THREADS>
constexpr int kBlocks = THREADS <= kFewThreads ? 2 : 1;

template <class T>
__device__ inline float rounded(float x) {
    T narrow;
    from_float(narrow, x);
    return to_float(narrow);
}

// The division is inexact in its last place, and 0 where the divisor is beyond 2^126, as it ought to be. An exact one would be a call.
__device__ inline float sigmoid(float x) { return __fdividef(1.f, 1.f + expf(-x)); }

// The sum over all threads of a block, in every one of them, always in the same order.
__device__ inline float block_sum(float value) {
    __shared__ float all[1024], few[32];
    all[threadIdx.x] = value;
    __syncthreads();
    if (threadIdx.x < 32) {
        float sum = 0.f;
        for (unsigned i = threadIdx.x; i < blockDim.x; i += 32) sum += all[i];
        few[threadIdx.x] = sum;
    }
    __syncthreads();
    float sum = 0.f;
#pragma unroll 8
    for (int i = 0; i < 32; ++i) sum += few[i];
    return sum;
}

// The tensors of a mixes call.
template <class T>
struct Mixing {
    const T *x, *handed_in;
    const float *weight, *bias;
    const float* mixing[kMixes];
};

// Four channels of a mix: how much there is of the row itself.
template <class T>
__device__ inline Quad<float> mix_of(const Rows& c, const Mixing<T>& t, int m, int column) {
    Quad<float> mix = load(t.mixing[m] + column);
    if (c.of_before)
        for (int q = 0; q < 4; ++q) mix.at[q] = 1.f - mix.at[q];
    return mix;
}

template <class T>
struct Gradients {
    const T* mixed[kMixes];
    const T* last;
    const T* past;
};

// Four channels of a token as its neighbours see it: its row after the norm, or what was handed in.
template <class T>
struct Token {
    int row = -1;
    float mean = 0.f, rstd = 0.f;
    Quad<float> normed{};

    // Before the norm: read again rather than kept.
    __device__ Quad<float> values(const Rows& c, const Mixing<T>& t, int column, bool in) const {
        return in ? load(t.x + int64_t(row) * c.n_channels + column) : Quad<float>{};
    }

    // Called by all threads of a block alike; `in` says whether this one has channels.
    __device__ void set(const Rows& c, const Mixing<T>& t, int number, int column, bool in) {
        row = number;
        if (number >= c.n_rows) {
            if (in && t.handed_in != nullptr) normed = load(t.handed_in + int64_t(number - c.n_rows) * c.n_channels + column);
            else normed = Quad<float>{};
            return;
        }
        const Quad<float> x = values(c, t, column, in);
        const float share = __fdividef(1.f, float(c.n_channels));
        mean = block_sum(x.at[0] + x.at[1] + x.at[2] + x.at[3]) * share;
        float squares = 0.f;
        for (int q = 0; q < 4; ++q) squares += in ? (x.at[q] - mean) * (x.at[q] - mean) : 0.f;
        rstd = rsqrtf(block_sum(squares) * share + float(c.eps));
        if (!in) return;
        const Quad<float> weight = load(t.weight + column), bias = load(t.bias + column);
        for (int q = 0; q < 4; ++q) normed.at[q] = rounded<T>((x.at[q] - mean) * rstd * weight.at[q] + bias.at[q]);
    }
};

template <class T, int M, int THREADS>
__global__ void __launch_bounds__(THREADS, kBlocks<THREADS>) mixes_out(Rows c, Mixing<T> t, T* mixed, T* last) {
    const int column = threadIdx.x * 4, n = c.n_channels;
    const bool in = column < n;
    const int first = blockIdx.x * c.strip, n_strips = (c.n_rows + c.strip - 1) / c.strip;
    Token<T> token, before;
    if (blockIdx.x >= n_strips) {  // behind the rows' blocks, one a segment
        const int segment = blockIdx.x - n_strips;
        token.set(c, t, int(c.last_rows[segment]), column, in);
        if (in) store(last + int64_t(segment) * n + column, token.normed);
        return;
    }
#pragma unroll 1
    for (int row = first; row < min(c.n_rows, first + c.strip); ++row) {
        token.set(c, t, row, column, in);
        if (before.row != c.before[row]) before.set(c, t, c.before[row], column, in);
        if (in) {
#pragma unroll
            for (int m = 0; m < M; ++m) {
                const Quad<float> mix = mix_of(c, t, m, column);
                Quad<float> out;
                for (int q = 0; q < 4; ++q) out.at[q] = before.normed.at[q] + (token.normed.at[q] - before.normed.at[q]) * mix.at[q];
                store(mixed + (int64_t(m) * c.n_rows + row) * n + column, out);
            }
        }
        before = token;
    }
}

// What the rows that use token `number` hand to it is added to g.
template <class T, int M>
__device__ inline void gather(const Rows& c, const Mixing<T>& t, const Gradients<T>& grads, int number, int column, int known_row,
                              const Quad<float>& known, Quad<float>& g) {
    const int n = c.n_channels;
    for (int at = c.uses_start[number]; at < c.uses_start[number + 1]; ++at) {
        const int use = c.uses[at];
        if (use == known_row) {
            for (int q = 0; q < 4; ++q) g.at[q] += known.at[q];
        } else if (use < c.n_rows) {
#pragma unroll
            for (int m = 0; m < M; ++m) {
                if (grads.mixed[m] == nullptr) continue;
                const Quad<float> from = load(grads.mixed[m] + int64_t(use) * n + column), mix = mix_of(c, t, m, column);
                for (int q = 0; q < 4; ++q) g.at[q] += from.at[q] * (1.f - mix.at[q]);
            }
        } else if (grads.last != nullptr) {
            const Quad<float> from = load(grads.last + int64_t(use - c.n_rows) * n + column);
            for (int q = 0; q < 4; ++q) g.at[q] += from.at[q];
        }
    }
}

// What a strip adds to the gradients of N vectors, four channels of each: in registers, or, where a block has so many threads that they
// would spill, in memory, where no other thread looks.
template <int N, bool IN_REGISTERS>
struct Sums {
    Quad<float> at[IN_REGISTERS ? N : 1] = {};
    float* memory;
    int pitch;
    bool in;

    __device__ Sums(float* memory, int pitch, bool in) : memory(memory), pitch(pitch), in(in) {
        if (!IN_REGISTERS && in)
            for (int i = 0; i < N; ++i) store(memory + i * pitch, Quad<float>{});
    }
    __device__ void add(int i, const Quad<float>& x) {
        if (IN_REGISTERS) {
            for (int q = 0; q < 4; ++q) at[i].at[q] += x.at[q];
        } else if (in) {
            Quad<float> sum = load(memory + i * pitch);
            for (int q = 0; q < 4; ++q) sum.at[q] += x.at[q];
            store(memory + i * pitch, sum);
        }
    }
    __device__ void finish() const {
        if (IN_REGISTERS && in)
#pragma unroll
            for (int i = 0; i < N; ++i) store(memory + i * pitch, at[i]);
    }
};

template <class T, int M, int THREADS>
__global__ void __launch_bounds__(THREADS, kBlocks<THREADS>)
    mixes_back(Rows c, Mixing<T> t, Gradients<T> grads, T* gx, T* g_handed_in, float* partial) {
    const int column = threadIdx.x * 4, n = c.n_channels;
    const bool in = column < n;
    const int n_strips = (c.n_rows + c.strip - 1) / c.strip;
    if (blockIdx.x >= n_strips) {  // behind the rows' blocks, one a root
        const int root = blockIdx.x - n_strips;
        Quad<float> g{};
        if (!in) return;
        gather<T, M>(c, t, grads, c.n_rows + root, column, -1, g, g);
        store(g_handed_in + int64_t(root) * n + column, g);
        return;
    }
    Sums<2 + M, THREADS <= kFewThreads> sums(partial + int64_t(blockIdx.x) * (2 + M) * n + column, n, in);
    Quad<float> g_before{};
    Token<T> token, before;
    int known_row = -1;  // whose g_before is at hand
    const float share = __fdividef(1.f, float(n));
    const int first = blockIdx.x * c.strip;
#pragma unroll 1
    for (int row = min(c.n_rows, first + c.strip) - 1; row >= first; --row) {
        token = before;
        if (token.row != row) token.set(c, t, row, column, in);
        before.set(c, t, c.before[row], column, in);
        Quad<float> g{};
        if (in) gather<T, M>(c, t, grads, row, column, known_row, g_before, g);
        g_before = Quad<float>{};
        if (in) {
#pragma unroll
            for (int m = 0; m < M; ++m) {
                if (grads.mixed[m] == nullptr) continue;
                const Quad<float> from = load(grads.mixed[m] + int64_t(row) * n + column), mix = mix_of(c, t, m, column);
                Quad<float> g_mix;
                for (int q = 0; q < 4; ++q) {
                    const float value = from.at[q];
                    g.at[q] += value * mix.at[q];
                    g_before.at[q] += value - value * mix.at[q];
                    g_mix.at[q] = value * (token.normed.at[q] - before.normed.at[q]) * (c.of_before ? -1.f : 1.f);
                }
                sums.add(2 + m, g_mix);
            }
        }
        // With many threads there are too few registers to keep it, and the row below adds it up from memory.
        if (THREADS <= kFewThreads) known_row = row;
        const Quad<float> weight = in ? load(t.weight + column) : Quad<float>{};
        const Quad<float> x = token.values(c, t, column, in);
        sums.add(1, g);
        Quad<float> g_weight;
        float sum = 0.f, along = 0.f;
        for (int q = 0; q < 4; ++q) {
            const float normed = (x.at[q] - token.mean) * token.rstd;
            g_weight.at[q] = g.at[q] * normed;
            g.at[q] *= weight.at[q];
            sum += g.at[q];
            along += g.at[q] * normed;
        }
        sums.add(0, g_weight);
        sum = block_sum(sum) * share;
        along = block_sum(along) * share;
        if (in) {
            const Quad<float> past = grads.past == nullptr ? Quad<float>{} : load(grads.past + int64_t(row) * n + column);
            for (int q = 0; q < 4; ++q)
                g.at[q] = token.rstd * (g.at[q] - sum - (x.at[q] - token.mean) * token.rstd * along) + past.at[q];
            store(gx + int64_t(row) * n + column, g);
        }
    }
    sums.finish();
}

// The sum over the threads of one head, in each of them; all threads of the block call it.
__device__ inline float head_sum(float value, int first, int n_threads) {
    __shared__ float all[1024];
    __syncthreads();
    all[threadIdx.x] = value;
    __syncthreads();
    float sum = 0.f;
    for (int i = 0; i < n_threads; ++i) sum += all[min(first + i, 1023)];
    return sum;
}

// Which threads share this one's head.
struct HeadOf {
    int first, n_threads;
    float share;  // of a channel in a mean over the head
    __device__ explicit HeadOf(int head_size) : first(threadIdx.x * 4 / head_size * (head_size / 4)), n_threads(head_size / 4) {
        share = __fdividef(1.f, float(head_size));
    }
    __device__ float sum(float value) const { return head_sum(value, first, n_threads); }
    __device__ float mean(float value) const { return sum(value) * share; }
};

// Of a head's channels, four of which this thread has in x.
struct HeadMoments {
    float mean, rstd;
    __device__ HeadMoments(const HeadOf& head, const Quad<float>& x, float eps) {
        mean = head.mean(x.at[0] + x.at[1] + x.at[2] + x.at[3]);
        float squares = 0.f;
        for (int q = 0; q < 4; ++q) squares += (x.at[q] - mean) * (x.at[q] - mean);
        rstd = rsqrtf(head.mean(squares) + eps);
    }
};

template <class T>
__global__ void __launch_bounds__(1024) gated_norm_out(Heads c, const T* y, const T* gate, const float* weight, const float* bias, T* out) {
    const int column = threadIdx.x * 4, n = c.n_heads * c.head_size;
    const bool in = column < n;
    const HeadOf head(c.head_size);
    const int first = blockIdx.x * c.strip;
    for (int row = first; row < min(c.n_rows, first + c.strip); ++row) {
        const int64_t at = int64_t(row) * n + column;
        const Quad<float> x = in ? load(y + at) : Quad<float>{};
        const HeadMoments m(head, x, float(c.eps));
        if (!in) continue;
        const Quad<float> w = load(weight + column), b = load(bias + column), z = load(gate + at);
        Quad<float> result;
        for (int q = 0; q < 4; ++q) result.at[q] = ((x.at[q] - m.mean) * m.rstd * w.at[q] + b.at[q]) * z.at[q] * sigmoid(z.at[q]);
        store(out + at, result);
    }
}

template <class T>
__global__ void __launch_bounds__(1024) gated_norm_back(Heads c, const T* y, const T* gate, const float* weight, const float* bias,
                                                        const T* g_out, T* gy, T* g_gate, float* partial) {
    const int column = threadIdx.x * 4, n = c.n_heads * c.head_size;
    const bool in = column < n;
    const HeadOf head(c.head_size);
    Quad<float> g_weight{}, g_bias{};
    const int first = blockIdx.x * c.strip;
    for (int row = first; row < min(c.n_rows, first + c.strip); ++row) {
        const int64_t at = int64_t(row) * n + column;
        const Quad<float> x = in ? load(y + at) : Quad<float>{};
        const HeadMoments m(head, x, float(c.eps));
        Quad<float> g{}, to_gate{};
        float sum = 0.f, along = 0.f;
        if (in) {
            const Quad<float> w = load(weight + column), b = load(bias + column), z = load(gate + at), grad = load(g_out + at);
            for (int q = 0; q < 4; ++q) {
                const float s = sigmoid(z.at[q]), normed = (x.at[q] - m.mean) * m.rstd, value = grad.at[q] * z.at[q] * s;
                to_gate.at[q] = grad.at[q] * (normed * w.at[q] + b.at[q]) * s * (1.f + z.at[q] * (1.f - s));
                g_weight.at[q] += value * normed;
                g_bias.at[q] += value;
                g.at[q] = value * w.at[q];
                sum += g.at[q];
                along += g.at[q] * normed;
            }
            store(g_gate + at, to_gate);
        }
        sum = head.mean(sum);
        along = head.mean(along);
        if (!in) continue;
        for (int q = 0; q < 4; ++q) g.at[q] = m.rstd * (g.at[q] - sum - (x.at[q] - m.mean) * m.rstd * along);
        store(gy + at, g);
    }
    if (!in) return;
    store(partial + int64_t(blockIdx.x) * 2 * n + column, g_weight);
    store(partial + (int64_t(blockIdx.x) * 2 + 1) * n + column, g_bias);
}

// out [width] is the sum of partial [n_parts, width]: a block takes 32 columns, and eight groups of threads their parts in turn.
__global__ void __launch_bounds__(kThreads) add_up(const float* partial, int n_parts, int width, float* out) {
    __shared__ float sums[kThreads];
    const int lane = threadIdx.x % 32, group = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    float sum = 0.f;
    if (column < width)
        for (int part = group; part < n_parts; part += kThreads / 32) sum += partial[int64_t(part) * width + column];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (group != 0 || column >= width) return;
    sum = 0.f;
    for (int i = 0; i < kThreads / 32; ++i) sum += sums[i * 32 + lane];
    out[column] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) relu_squared_out(int64_t n, const T* x, T* out) {
    const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 4;
    if (at >= n) return;
    Quad<float> value = load(x + at);
    for (int q = 0; q < 4; ++q) {
        const float positive = value.at[q] < 0.f ? 0.f : value.at[q];
        value.at[q] = positive * positive;
    }
    store(out + at, value);
}

template <class T>
__global__ void __launch_bounds__(kThreads) relu_squared_back(int64_t n, const T* x, const T* g, T* gx) {
    const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 4;
    if (at >= n) return;
    Quad<float> value = load(x + at);
    const Quad<float> grad = load(g + at);
    for (int q = 0; q < 4; ++q) value.at[q] = 2.f * (value.at[q] < 0.f ? 0.f : value.at[q]) * grad.at[q];
    store(gx + at, value);
}

template <class T>
__global__ void __launch_bounds__(kThreads) sigmoid_gate_out(int64_t n, const T* gate, const T* value, T* out) {
    const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 4;
    if (at >= n) return;
    const Quad<float> z = load(gate + at);
    Quad<float> result = load(value + at);
    for (int q = 0; q < 4; ++q) result.at[q] *= sigmoid(z.at[q]);
    store(out + at, result);
}

template <class T>
__global__ void __launch_bounds__(kThreads) sigmoid_gate_back(int64_t n, const T* gate, const T* value, const T* g, T* g_gate, T* g_value) {
    const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 4;
    if (at >= n) return;
    const Quad<float> z = load(gate + at), v = load(value + at), grad = load(g + at);
    Quad<float> to_gate, to_value;
    for (int q = 0; q < 4; ++q) {
        const float s = sigmoid(z.at[q]);
        to_gate.at[q] = grad.at[q] * v.at[q] * s * (1.f - s);
        to_value.at[q] = grad.at[q] * s;
    }
    store(g_gate + at, to_gate);
    store(g_value + at, to_value);
}

template <class Call>
cudaStream_t stream_of(const Call& c) {
    return static_cast<cudaStream_t>(c.where.stream);
}

int threads_for(int n_channels) { return (n_channels / 4 + 31) / 32 * 32; }
cudaError_t total(cudaStream_t stream, const float* partial, int n_parts, int width, float* out) {
    return launch(add_up, (width + 31) / 32, kThreads, stream, partial, n_parts, width, out);
}

template <class T>
Mixing<T> mixing_of(const Rows& c, const void* x, const void* handed_in, const void* weight, const void* bias, const void* const* mixing) {
    Mixing<T> t{static_cast<const T*>(x), static_cast<const T*>(handed_in), static_cast<const float*>(weight),
                static_cast<const float*>(bias), {}};
    for (int m = 0; m < c.n_mixes; ++m) t.mixing[m] = static_cast<const float*>(mixing[m]);
    return t;
}

template <class T, int M>
cudaError_t mixes_out_of(const Rows& c, const Mixing<T>& t, T* mixed, T* last) {
    const int threads = threads_for(c.n_channels), n_blocks = n_strips(c.n_rows, c.strip) + c.n_segments;
    const auto kernel = threads <= kFewThreads ? mixes_out<T, M, kFewThreads> : mixes_out<T, M, kManyThreads<T>>;
    return launch(kernel, n_blocks, threads, stream_of(c), c, t, mixed, last);
}

template <class T, int M>
cudaError_t mixes_back_of(const Rows& c, const Mixing<T>& t, const Gradients<T>& grads, T* gx, T* g_handed_in, float* partial,
                          float* g_parameters) {
    const int threads = threads_for(c.n_channels), n_parts = n_strips(c.n_rows, c.strip);
    const auto kernel = threads <= kFewThreads ? mixes_back<T, M, kFewThreads> : mixes_back<T, M, kManyThreads<T>>;
    const int n_blocks = n_parts + (g_handed_in == nullptr ? 0 : c.n_roots);
    const cudaError_t error = launch(kernel, n_blocks, threads, stream_of(c), c, t, grads, gx, g_handed_in, partial);
    return error == cudaSuccess ? total(stream_of(c), partial, n_parts, (2 + M) * c.n_channels, g_parameters) : error;
}

// f with the type that a call's dtype stands for; the numbers are those of compiled.py.
template <class F>
cudaError_t with_type(int dtype, F f) {
    switch (dtype) {
        case 0: return f(float());
        case 1: return f(__nv_bfloat16());
        case 2: return f(__half());
        default: return cudaErrorInvalidConfiguration;
    }
}

template <int M>
struct Count {
    static constexpr int value = M;
};

// The numbers of mixes that RWKV's halves have.
template <class F>
cudaError_t with_count(int n_mixes, F f) {
    switch (n_mixes) {
        case 1: return f(Count<1>());
        case 2: return f(Count<2>());
        case 3: return f(Count<3>());
        case 4: return f(Count<4>());
        case 6: return f(Count<6>());
        default: return cudaErrorInvalidConfiguration;
    }
}

int n_blocks_of(const Flat& c) { return int((c.n / 4 + kThreads - 1) / kThreads); }

}  // namespace

// Return a cudaError_t (0: all launches were accepted). Channels, heads' sizes and numbers of elements are multiples of 4, and channels
// are at most 4096, in fp32 3072.
extern "C" int mixes_forward(const Rows* c, const void* x, const void* handed_in, const void* weight, const void* bias,
                             const void* const* mixing, void* mixed, void* last) {
    return with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        const auto t = mixing_of<T>(*c, x, handed_in, weight, bias, mixing);
        return with_count(c->n_mixes, [=](auto count) {
            return mixes_out_of<T, decltype(count)::value>(*c, t, static_cast<T*>(mixed), static_cast<T*>(last));
        });
    });
}

extern "C" int mixes_backward(const Rows* c, const void* x, const void* handed_in, const void* weight, const void* bias,
                              const void* const* mixing, const void* const* g_mixed, const void* g_last, const void* g_past, void* gx,
                              void* g_handed_in, void* partial, void* g_parameters) {
    return with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        const auto t = mixing_of<T>(*c, x, handed_in, weight, bias, mixing);
        Gradients<T> grads{{}, static_cast<const T*>(g_last), static_cast<const T*>(g_past)};
        for (int m = 0; m < c->n_mixes; ++m) grads.mixed[m] = static_cast<const T*>(g_mixed[m]);
        return with_count(c->n_mixes, [=](auto count) {
            return mixes_back_of<T, decltype(count)::value>(*c, t, grads, static_cast<T*>(gx), static_cast<T*>(g_handed_in),
                                                            static_cast<float*>(partial), static_cast<float*>(g_parameters));
        });
    });
}

extern "C" int gated_norm_forward(const Heads* c, const void* y, const void* gate, const void* weight, const void* bias, void* out) {
    return with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        return launch(gated_norm_out<T>, n_strips(c->n_rows, c->strip), threads_for(c->n_heads * c->head_size), stream_of(*c), *c,
                      static_cast<const T*>(y), static_cast<const T*>(gate), static_cast<const float*>(weight),
                      static_cast<const float*>(bias), static_cast<T*>(out));
    });
}

extern "C" int gated_norm_backward(const Heads* c, const void* y, const void* gate, const void* weight, const void* bias,
                                   const void* g_out, void* gy, void* g_gate, void* partial, void* g_parameters) {
    return with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        const int n = c->n_heads * c->head_size, n_parts = n_strips(c->n_rows, c->strip);
        const cudaError_t error =
            launch(gated_norm_back<T>, n_parts, threads_for(n), stream_of(*c), *c, static_cast<const T*>(y), static_cast<const T*>(gate),
                   static_cast<const float*>(weight), static_cast<const float*>(bias), static_cast<const T*>(g_out), static_cast<T*>(gy),
                   static_cast<T*>(g_gate), static_cast<float*>(partial));
        if (error != cudaSuccess) return error;
        return total(stream_of(*c), static_cast<const float*>(partial), n_parts, 2 * n, static_cast<float*>(g_parameters));
    });
}

extern "C" int relu_squared_forward(const Flat* c, const void* x, void* out) {
    return with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        return launch(relu_squared_out<T>, n_blocks_of(*c), kThreads, stream_of(*c), c->n, static_cast<const T*>(x), static_cast<T*>(out));
    });
}

extern "C" int relu_squared_backward(const Flat* c, const void* x, const void* g, void* gx) {
    return with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        return launch(relu_squared_back<T>, n_blocks_of(*c), kThreads, stream_of(*c), c->n, static_cast<const T*>(x),
                      static_cast<const T*>(g), static_cast<T*>(gx));
    });
}

extern "C" int sigmoid_gate_forward(const Flat* c, const void* gate, const void* value, void* out) {
    return with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        return launch(sigmoid_gate_out<T>, n_blocks_of(*c), kThreads, stream_of(*c), c->n, static_cast<const T*>(gate),
                      static_cast<const T*>(value), static_cast<T*>(out));
    });
}

extern "C" int sigmoid_gate_backward(const Flat* c, const void* gate, const void* value, const void* g, void* g_gate, void* g_value) {
    return with_type(c->where.dtype, [=](auto type) {
        using T = decltype(type);
        return launch(sigmoid_gate_back<T>, n_blocks_of(*c), kThreads, stream_of(*c), c->n, static_cast<const T*>(gate),
                      static_cast<const T*>(value), static_cast<const T*>(g), static_cast<T*>(g_gate), static_cast<T*>(g_value));
    });
}

#include "fused_newer.cuh"
