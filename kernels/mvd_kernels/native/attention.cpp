// Softmax(q k^T / sqrt(C)) v, forward and backward, by the bf16 instructions of AVX-512.
//
// One thread computes one head of one clip, and the scores never leave its cache: the forward pass holds the scores of
// 12 queries, the backward pass recomputes them in tiles of queries and keys. Products are of bf16, sums in float32.
//
// Legend: B clips, N tokens, Q queries (the last Q tokens), H heads, C channels of a head.
// The caller fills the gradient with zeros; the gradients of queries that are not computed stay zero.
// qkv is (B, N, 3, H, C) and out (B, Q, H, C), bf16; sums (B, H, Q) float32: log2 of the sum of 2^(score * log2 e).

#ifdef __AVX512BF16__

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

using bf16 = uint16_t;

namespace {

constexpr int ROWS = 12;     // queries whose scores are computed in one register block
constexpr int COLUMNS = 32;  // keys of that block: 12 x 32 float32 sums fill 24 of the 32 registers
constexpr int QUERIES = 96;  // queries per tile of the backward pass
constexpr int BLOCKS = 7;    // largest number of keys per tile, in columns of 32
constexpr float LOG2E = 1.44269504f;

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

constexpr int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Rows per register block of a product into C channels: as many as the registers can hold sums for. All divide 12.
constexpr int rows_together(int C) { return C == 32 ? 12 : C == 64 ? 6 : C == 128 ? 3 : 4; }

template <typename T>
struct Room {
    explicit Room(int64_t count) : at(static_cast<T *>(std::aligned_alloc(64, up(count * sizeof(T), 64)))) {}
    Room(const Room &) = delete;
    ~Room() { std::free(at); }
    T *const at;
};

// Rows of C channels with a stride between them, such as the queries of one head.
struct Rows {
    const bf16 *at;
    int64_t stride;
    int count;
    const bf16 *row(int64_t n) const { return at + n * stride; }
};

INLINE __m512bh load(const bf16 *pairs) { return (__m512bh)_mm512_loadu_si512(pairs); }

INLINE __m512bh load_one(const bf16 *pair) {
    int32_t bits;
    std::memcpy(&bits, pair, sizeof bits);
    return (__m512bh)_mm512_set1_epi32(bits);
}

INLINE __m512 load_wide(const bf16 *from) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
}

INLINE __m256i narrow(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

INLINE void store(bf16 *to, __m256i values) { _mm256_storeu_si256((__m256i *)to, values); }

// Interleave two rows, value by value.
INLINE void store_pairs(bf16 *to, __m256i even, __m256i odd) {
    __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
    _mm512_storeu_si512(to, _mm512_or_si512(_mm512_cvtepu16_epi32(even), high));
}

// 2^min(x, 0) by a polynomial whose error is far below the rounding of bf16.
INLINE __m512 exp2_of(__m512 x) {
    // Padded keys may have any score, so the exponent is clamped to keep their shares finite. In this order of min and
    // max a NaN stays NaN.
    x = _mm512_min_ps(_mm512_set1_ps(0.0f), _mm512_max_ps(_mm512_set1_ps(-150.0f), x));
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 sum = _mm512_set1_ps(0.00961813f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.05550411f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.24022651f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.69314718f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, whole);
}

// Pack (N, C) to [N / 32][C / 2][32][2], the order in which `scores` reads 32 keys; zeros up to `padded` rows.
void pack_columns(bf16 *to, Rows from, int padded, int C) {
    std::memset(to, 0, sizeof(bf16) * padded * C);
    for (int n = 0; n < from.count; n++)
        for (int c = 0; c < C; c += 2)
            std::memcpy(to + int64_t(n / COLUMNS) * C * COLUMNS + c * COLUMNS + n % COLUMNS * 2, from.row(n) + c, 4);
}

// Pack (N, C) to [N / 2][C][2], two rows interleaved, for products that sum over rows.
void pack_pairs(bf16 *to, Rows from, int padded, int C) {
    for (int n = 0; n < padded; n++)
        for (int c = 0; c < C; c++) to[int64_t(n / 2) * 2 * C + 2 * c + n % 2] = n < from.count ? from.row(n)[c] : 0;
}

// Copy (N, C) to contiguous rows (padded, C); the padding is zero.
void pack_rows(bf16 *to, Rows from, int padded, int C) {
    for (int n = 0; n < from.count; n++) std::memcpy(to + int64_t(n) * C, from.row(n), sizeof(bf16) * C);
    std::memset(to + int64_t(from.count) * C, 0, sizeof(bf16) * (padded - from.count) * C);
}

// Compute the products of 12 rows (12, C) and 32 packed columns.
template <int C>
INLINE void scores(__m512 sums[ROWS][2], const bf16 *rows, const bf16 *columns) {
    UNROLL for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int c = 0; c < C; c += 2) {
        const __m512bh left = load(columns + c * COLUMNS), right = load(columns + (c + 1) * COLUMNS);
        UNROLL for (int r = 0; r < ROWS; r++) {
            const __m512bh row = load_one(rows + r * C + c);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], row, left);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], row, right);
        }
    }
}

// Address of the pairs of a left factor: the pair of row r and step s is at `at + r * row + s * step`.
struct Pairs {
    const bf16 *at;
    int64_t row, step;
};

// sums (R, C) += R rows of pairs times packed pairs [steps][C][2].
template <int C, int R = rows_together(C)>
INLINE void multiply(__m512 sums[R][C / 16], Pairs left, const bf16 *right, int steps) {
    for (int s = 0; s < steps; s++) {
        __m512bh values[C / 16];
        UNROLL for (int k = 0; k < C / 16; k++) values[k] = load(right + int64_t(s) * 2 * C + 32 * k);
        UNROLL for (int r = 0; r < R; r++) {
            const __m512bh pair = load_one(left.at + r * left.row + s * left.step);
            UNROLL for (int k = 0; k < C / 16; k++) sums[r][k] = _mm512_dpbf16_ps(sums[r][k], pair, values[k]);
        }
    }
}

// The same sum into float32 (rows, C) in memory, for a multiple of 12 rows.
template <int C, int R = rows_together(C)>
INLINE void accumulate(float *to, int rows, Pairs left, const bf16 *right, int steps) {
    for (int first = 0; first < rows; first += R) {
        __m512 sums[R][C / 16];
        float *here = to + int64_t(first) * C;
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int k = 0; k < C / 16; k++) sums[r][k] = _mm512_loadu_ps(here + r * C + 16 * k);
        multiply<C>(sums, {left.at + first * left.row, left.row, left.step}, right, steps);
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int k = 0; k < C / 16; k++) _mm512_storeu_ps(here + r * C + 16 * k, sums[r][k]);
    }
}

// Softmax of the scores of one query, unnormalised: writes the exponentials, returns the factor that normalises them
// and stores the logarithm of their sum.
float soften(bf16 *shares, float *scores, int tokens, int padded, float scale, float *logarithm) {
    std::fill(scores + tokens, scores + padded, -INFINITY);
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (int n = 0; n < padded; n += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + n));
    const float top = _mm512_reduce_max_ps(most) * scale;
    __m512 total = _mm512_setzero_ps();
    for (int n = 0; n < padded; n += 16) {
        const __m512 score = _mm512_fmsub_ps(_mm512_loadu_ps(scores + n), _mm512_set1_ps(scale), _mm512_set1_ps(top));
        const __m512 share = exp2_of(score);
        total = _mm512_add_ps(total, share);
        store(shares + n, narrow(share));
    }
    const float sum = _mm512_reduce_add_ps(total);
    *logarithm = top + std::log2(sum);
    return 1 / sum;
}

template <int C>
void forward(Rows query, Rows key, Rows value, bf16 *out, int64_t out_stride, float *logarithms) {
    constexpr int R = rows_together(C);
    const float scale = LOG2E / std::sqrt(float(C));
    const int tokens = key.count, padded = up(tokens, COLUMNS);
    Room<bf16> keys(int64_t(padded) * C), values(int64_t(padded) * C), shares(ROWS * padded), rows(ROWS * C);
    Room<float> score(ROWS * padded);
    pack_columns(keys.at, key, padded, C);
    pack_pairs(values.at, value, padded, C);
    for (int first = 0; first < query.count; first += ROWS) {
        const int count = std::min(ROWS, query.count - first);
        pack_rows(rows.at, {query.row(first), query.stride, count}, ROWS, C);
        for (int n = 0; n < padded; n += COLUMNS) {
            __m512 sums[ROWS][2];
            scores<C>(sums, rows.at, keys.at + int64_t(n) * C);
            UNROLL for (int r = 0; r < ROWS; r++)
                UNROLL for (int k = 0; k < 2; k++) _mm512_storeu_ps(score.at + r * padded + n + 16 * k, sums[r][k]);
        }
        float factors[ROWS];
        for (int r = 0; r < ROWS; r++) {
            float unused, *logarithm = r < count ? logarithms + first + r : &unused;
            factors[r] = soften(shares.at + r * padded, score.at + r * padded, tokens, padded, scale, logarithm);
        }
        for (int part = 0; part < count; part += R) {
            __m512 sums[R][C / 16] = {};
            multiply<C>(sums, {shares.at + part * padded, padded, 2}, values.at, padded / 2);
            for (int r = 0; r < R && part + r < count; r++)
                UNROLL for (int k = 0; k < C / 16; k++) {
                    const __m512 mean = _mm512_mul_ps(sums[r][k], _mm512_set1_ps(factors[part + r]));
                    store(out + (first + part + r) * out_stride + 16 * k, narrow(mean));
                }
        }
    }
}

// Buffers of the backward pass for one tile of queries and keys: softmax shares, and gradients of the scores (slopes).
struct Tile {
    explicit Tile(int width) : stride(up(width, ROWS)), room(3 * QUERIES * stride) {
        std::memset(room.at, 0, sizeof(bf16) * 3 * QUERIES * stride);
    }
    const int64_t stride;  // keys, padded to a multiple of 12
    Room<bf16> room;
    bf16 *slopes() const { return room.at; }                                      // (queries, keys)
    bf16 *slope_pairs() const { return room.at + QUERIES * stride; }              // [queries / 2][keys][2]
    bf16 *share_pairs() const { return room.at + 2 * QUERIES * stride; }          // the same
};

// Compute 12 queries and 32 keys of a tile, from query `r` and key `n` on.
template <int C>
INLINE void fill(
    const Tile &tile, int r, int n, const bf16 *query, const bf16 *gradient, const bf16 *key, const bf16 *value,
    const float *logarithms, const float *losses
) {
    const float root = 1 / std::sqrt(float(C));
    __m512 sums[ROWS][2];
    float shares[ROWS][COLUMNS];
    scores<C>(sums, query, key);
    UNROLL for (int i = 0; i < ROWS; i++)
        UNROLL for (int k = 0; k < 2; k++) {
            const __m512 score = _mm512_fmsub_ps(sums[i][k], _mm512_set1_ps(root * LOG2E), _mm512_set1_ps(logarithms[i]));
            _mm512_storeu_ps(shares[i] + 16 * k, exp2_of(score));
        }
    scores<C>(sums, gradient, value);
    UNROLL for (int i = 0; i < ROWS; i += 2)
        UNROLL for (int k = 0; k < 2; k++) {
            __m256i share[2], slope[2];
            UNROLL for (int odd = 0; odd < 2; odd++) {
                const __m512 all = _mm512_loadu_ps(shares[i + odd] + 16 * k);
                const __m512 change = _mm512_sub_ps(sums[i + odd][k], _mm512_set1_ps(losses[i + odd]));
                share[odd] = narrow(all);
                slope[odd] = narrow(_mm512_mul_ps(_mm512_mul_ps(all, change), _mm512_set1_ps(root)));
                store(tile.slopes() + (r + i + odd) * tile.stride + n + 16 * k, slope[odd]);
            }
            const int64_t at = (r + i) * tile.stride + 2 * n + 32 * k;
            store_pairs(tile.share_pairs() + at, share[0], share[1]);
            store_pairs(tile.slope_pairs() + at, slope[0], slope[1]);
        }
}

// Convert float32 (rows, C) to rows of bf16.
void hand_over(bf16 *to, int64_t stride, const float *from, int rows, int C) {
    for (int64_t n = 0; n < rows; n++)
        for (int c = 0; c < C; c += 16) store(to + n * stride + c, narrow(_mm512_loadu_ps(from + n * C + c)));
}

template <int C>
void backward(
    Rows query, Rows key, Rows value, Rows out, Rows gradient, const float *sums, bf16 *to_query, bf16 *to_key,
    bf16 *to_value
) {
    const int tokens = key.count, queries = query.count, asked = up(queries, ROWS);
    const int columns = up(tokens, COLUMNS) / COLUMNS, tiles = up(columns, BLOCKS) / BLOCKS;
    const int width = up(columns, tiles) / tiles * COLUMNS, padded = width * tiles;
    const int64_t key_size = int64_t(padded) * C, query_size = int64_t(asked) * C;
    Room<bf16> keys(key_size), values(key_size), key_pairs(key_size);
    Room<bf16> rows(query_size), gradients(query_size), row_pairs(query_size), gradient_pairs(query_size);
    pack_columns(keys.at, key, padded, C);
    pack_columns(values.at, value, padded, C);
    pack_pairs(key_pairs.at, key, padded, C);
    pack_rows(rows.at, query, asked, C);
    pack_rows(gradients.at, gradient, asked, C);
    pack_pairs(row_pairs.at, query, asked, C);
    pack_pairs(gradient_pairs.at, gradient, asked, C);

    // The term of the softmax's gradient that is common to all scores of a query: the sum over out * gradient. It is 0
    // for padding queries, which have no gradient.
    Room<float> logarithms(asked), losses(asked);
    for (int n = 0; n < asked; n++) {
        __m512 loss = _mm512_setzero_ps();
        for (int c = 0; n < queries && c < C; c += 16)
            loss = _mm512_fmadd_ps(load_wide(out.row(n) + c), load_wide(gradient.row(n) + c), loss);
        losses.at[n] = _mm512_reduce_add_ps(loss);
        logarithms.at[n] = n < queries ? sums[n] : 0;
    }

    const Tile tile(width);
    Room<float> query_sums(query_size), key_sums(tile.stride * C), value_sums(tile.stride * C);
    std::fill_n(query_sums.at, query_size, 0.0f);
    for (int from = 0; from < padded; from += width) {
        std::fill_n(key_sums.at, tile.stride * C, 0.0f);
        std::fill_n(value_sums.at, tile.stride * C, 0.0f);
        for (int first = 0; first < asked; first += QUERIES) {
            const int count = std::min(QUERIES, asked - first);
            const int64_t at = int64_t(first) * C;
            for (int r = 0; r < count; r += ROWS)
                for (int n = 0; n < width; n += COLUMNS)
                    fill<C>(tile, r, n, rows.at + at + r * C, gradients.at + at + r * C,
                            keys.at + int64_t(from + n) * C, values.at + int64_t(from + n) * C,
                            logarithms.at + first + r, losses.at + first + r);
            const Pairs by_query{tile.slopes(), tile.stride, 2};
            accumulate<C>(query_sums.at + at, count, by_query, key_pairs.at + int64_t(from) * C, width / 2);
            const Pairs slopes{tile.slope_pairs(), 2, 2 * tile.stride}, shares{tile.share_pairs(), 2, 2 * tile.stride};
            accumulate<C>(key_sums.at, tile.stride, slopes, row_pairs.at + at, count / 2);
            accumulate<C>(value_sums.at, tile.stride, shares, gradient_pairs.at + at, count / 2);
        }
        const int there = std::min(width, tokens - from);
        hand_over(to_key + from * key.stride, key.stride, key_sums.at, there, C);
        hand_over(to_value + from * key.stride, key.stride, value_sums.at, there, C);
    }
    hand_over(to_query, query.stride, query_sums.at, queries, C);
}

template <int C>
void forward_all(const bf16 *qkv, bf16 *out, float *sums, int64_t B, int64_t N, int64_t Q, int64_t H, int64_t threads) {
    const int64_t stride = 3 * H * C;
    // If there are few heads for many threads, each head is cut into ranges of queries.
    const int64_t parts = std::min(up(4 * threads, B * H) / (B * H), up(Q, QUERIES) / QUERIES);
    const int64_t range = up(up(Q, parts) / parts, ROWS);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < B * H * parts; task++) {
        const int64_t head = task / parts, b = head / H, h = head % H, first = task % parts * range;
        if (first >= Q) continue;
        const bf16 *query = qkv + b * N * stride + h * C, *key = query + H * C, *value = key + H * C;
        const Rows asking{query + (N - Q + first) * stride, stride, int(std::min(range, Q - first))};
        forward<C>(asking, {key, stride, int(N)}, {value, stride, int(N)}, out + ((b * Q + first) * H + h) * C, H * C,
                   sums + head * Q + first);
    }
}

template <int C>
void backward_all(
    const bf16 *qkv, const bf16 *out, const bf16 *gradient, const float *sums, bf16 *to_qkv, int64_t B, int64_t N,
    int64_t Q, int64_t H, int64_t threads
) {
    const int64_t stride = 3 * H * C;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t head = 0; head < B * H; head++) {
        const int64_t b = head / H, h = head % H, at = b * N * stride + h * C, from = (b * Q * H + h) * C;
        const bf16 *query = qkv + at, *key = query + H * C, *value = key + H * C;
        bf16 *to_query = to_qkv + at;
        backward<C>({query + (N - Q) * stride, stride, int(Q)}, {key, stride, int(N)}, {value, stride, int(N)},
                    {out + from, H * C, int(Q)}, {gradient + from, H * C, int(Q)}, sums + head * Q,
                    to_query + (N - Q) * stride, to_query + H * C, to_query + 2 * H * C);
    }
}

}  // namespace

extern "C" {

void mvd_attention_forward(
    const bf16 *qkv, bf16 *out, float *sums, int64_t B, int64_t N, int64_t Q, int64_t H, int64_t C, int64_t threads
) {
    if (C == 32) forward_all<32>(qkv, out, sums, B, N, Q, H, threads);
    if (C == 64) forward_all<64>(qkv, out, sums, B, N, Q, H, threads);
    if (C == 80) forward_all<80>(qkv, out, sums, B, N, Q, H, threads);
    if (C == 96) forward_all<96>(qkv, out, sums, B, N, Q, H, threads);
    if (C == 128) forward_all<128>(qkv, out, sums, B, N, Q, H, threads);
}

void mvd_attention_backward(
    const bf16 *qkv, const bf16 *out, const bf16 *gradient, const float *sums, bf16 *to_qkv, int64_t B, int64_t N,
    int64_t Q, int64_t H, int64_t C, int64_t threads
) {
    if (C == 32) backward_all<32>(qkv, out, gradient, sums, to_qkv, B, N, Q, H, threads);
    if (C == 64) backward_all<64>(qkv, out, gradient, sums, to_qkv, B, N, Q, H, threads);
    if (C == 80) backward_all<80>(qkv, out, gradient, sums, to_qkv, B, N, Q, H, threads);
    if (C == 96) backward_all<96>(qkv, out, gradient, sums, to_qkv, B, N, Q, H, threads);
    if (C == 128) backward_all<128>(qkv, out, gradient, sums, to_qkv, B, N, Q, H, threads);
}
}

#endif
