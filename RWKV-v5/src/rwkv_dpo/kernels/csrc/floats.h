// 16-bit numbers as floats, on CPUs.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

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

}  // namespace
