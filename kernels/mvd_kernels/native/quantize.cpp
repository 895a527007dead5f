// Quantization of floating activations to 8 bits, with a separate range for each sequence.
//
// Legend: S sequences, L values of each.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int64_t CHUNK = 1 << 15;  // values per task of a thread
constexpr float LEAST_STEP = 1e-30f;

inline float value_of(float value) { return value; }

inline float value_of(uint16_t bf16) {
    uint32_t bits = uint32_t(bf16) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct Range {
    float low = 0, high = 0;
    float faults = 0;  // NaN if any value is not finite
};

template <typename T>
Range range_of(const T *from, int64_t count) {
    float low = 0, high = 0, faults = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : faults)
    for (int64_t i = 0; i < count; i++) {
        float value = value_of(from[i]);
        low = value < low ? value : low;
        high = value > high ? value : high;
        faults += value * 0;
    }
    return {low, high, faults};
}

template <typename T>
void to_levels(uint8_t *to, const T *from, int64_t count, float step, float zero, float most) {
    const float rate = 1 / step;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        float level = std::rint(value_of(from[i]) * rate) + zero;
        level = level < 0 ? 0 : level;
        to[i] = uint8_t(int32_t(level > most ? most : level));
    }
}

template <typename T>
void quantize(
    const T *from, uint8_t *to, float *steps, int32_t *zeros, int64_t S, int64_t L, int64_t levels, int threads
) {
    const int64_t chunks = (L + CHUNK - 1) / CHUNK;
    std::vector<Range> ranges(S * chunks);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t task = 0; task < S * chunks; task++) {
            const int64_t start = task % chunks * CHUNK;
            ranges[task] = range_of(from + task / chunks * L + start, std::min(CHUNK, L - start));
        }
#pragma omp for
        for (int64_t s = 0; s < S; s++) {
            Range all;
            for (int64_t c = s * chunks; c < (s + 1) * chunks; c++) {
                all.low = std::min(all.low, ranges[c].low);
                all.high = std::max(all.high, ranges[c].high);
                all.faults += ranges[c].faults;
            }
            const bool fine = std::isfinite(all.high - all.low + all.faults);
            steps[s] = fine ? std::max((all.high - all.low) / levels, LEAST_STEP) : std::numeric_limits<float>::quiet_NaN();
            zeros[s] = fine ? int32_t(std::rint(-all.low / steps[s])) : 0;
        }
#pragma omp for
        for (int64_t task = 0; task < S * chunks; task++) {
            const int64_t s = task / chunks, start = task % chunks * CHUNK, at = s * L + start;
            if (!std::isnan(steps[s])) to_levels(to + at, from + at, std::min(CHUNK, L - start), steps[s], zeros[s], levels);
        }
    }
}

}  // namespace

extern "C" {

void mvd_quantize_fp32(
    const float *from, uint8_t *to, float *steps, int32_t *zeros, int64_t S, int64_t L, int64_t levels, int64_t threads
) {
    quantize(from, to, steps, zeros, S, L, levels, threads);
}

void mvd_quantize_bf16(
    const uint16_t *from, uint8_t *to, float *steps, int32_t *zeros, int64_t S, int64_t L, int64_t levels, int64_t threads
) {
    quantize(from, to, steps, zeros, S, L, levels, threads);
}
}
