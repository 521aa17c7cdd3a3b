// What Python asks of every CUDA library, whichever kernels it has.
#pragma once

#include <cuda_runtime.h>

extern "C" const char* kernels_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

// A cudaError_t when the driver is too old for the runtime that the kernels are linked to. Touches no device.
extern "C" int kernels_usable() {
    int n_devices;
    return cudaGetDeviceCount(&n_devices);
}
