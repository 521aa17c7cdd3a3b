// Four neighbouring numbers of a row, as floats, moved by one instruction.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace {

template <class T>
struct alignas(4 * sizeof(T)) Quad {
    T at[4];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void from_float(float& to, float x) { to = x; }
__device__ inline void from_float(__half& to, float x) { to = __float2half(x); }
__device__ inline void from_float(__nv_bfloat16& to, float x) { to = __float2bfloat16(x); }

template <class T>
__device__ inline Quad<T> packed(const T* from) {
    return *reinterpret_cast<const Quad<T>*>(from);
}

template <class T>
__device__ inline Quad<float> widened(Quad<T> x) {
    return {to_float(x.at[0]), to_float(x.at[1]), to_float(x.at[2]), to_float(x.at[3])};
}

template <class T>
__device__ inline Quad<float> load(const T* from) {
    return widened(packed(from));
}

template <class T>
__device__ inline void store(T* to, Quad<float> x) {
    Quad<T> packed;
    for (int q = 0; q < 4; ++q) from_float(packed.at[q], x.at[q]);
    *reinterpret_cast<Quad<T>*>(to) = packed;
}

// Never with an empty grid, which CUDA takes for an error.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream, Arguments... arguments) {
    if (grid.x == 0) return cudaSuccess;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace
