// variable_width_embedding forward: rows without a projection are copied; for each band with one, a block
// collects those of its positions that lie in the band, and multiplies their rows by the projection.
#include "lib/embedding.cuh"

namespace sparse_attn::cuda {
namespace {

constexpr int kCopyWarps = 4;
constexpr int kPositions = 256;  // of a block of the projection

// A warp per position: zeros for padding, the row where its band has no projection.
template <class T>
__global__ void __launch_bounds__(32 * kCopyWarps) copy_rows_kernel(const EmbedParams p) {
    const int64_t position = static_cast<int64_t>(blockIdx.x) * kCopyWarps + threadIdx.x / 32;
    if (position >= p.count) return;
    const TokenPlace place = place_of(p, position);
    if (place.band >= 0 && p.bands[place.band].projection) return;
    constexpr int kPer = 16 / sizeof(T);
    const int lane = threadIdx.x % 32;
    const int64_t D = p.embedding_dim;
    T* to = static_cast<T*>(p.out) + position * D;
    const T* from = nullptr;
    bool whole = whole_rows(p.out, D, D, sizeof(T));
    if (place.band >= 0) {
        const EmbedBand& band = p.bands[place.band];
        from = static_cast<const T*>(band.table) + place.row * band.stride;
        whole = whole && whole_rows(band.table, band.stride, D, sizeof(T));
    }
    if (whole) {
        for (int64_t at = lane * kPer; at < D; at += 32 * kPer)
            *reinterpret_cast<uint4*>(to + at) =
                from ? *reinterpret_cast<const uint4*>(from + at) : uint4{0, 0, 0, 0};
    } else {
        for (int64_t at = lane; at < D; at += 32) to[at] = from ? from[at] : from_float<T>(0.f);
    }
}

// Positions of block x, columns of block y, band z.
template <class T>
__global__ void __launch_bounds__(kGemmThreads, 4) project_rows_kernel(const EmbedParams p) {
    using Gemm = GatheredGemm<T, false, false>;
    const EmbedBand& band = p.bands[blockIdx.z];
    if (!band.projection) return;
    constexpr int kRounds = kPositions / kGemmThreads, kWarps = kGemmThreads / 32;
    unsigned char* shared = dynamic_shared();
    int64_t* rows = reinterpret_cast<int64_t*>(shared + Gemm::kShared);  // [kPositions]
    int* members = reinterpret_cast<int*>(rows + kPositions);            // [kPositions], within the block
    int* counts = members + kPositions;                                  // [kRounds · kWarps]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kPositions;

    TokenPlace places[kRounds];
    unsigned votes[kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
        const int64_t position = first + r * kGemmThreads + threadIdx.x;
        places[r] = position < p.count ? place_of(p, position) : TokenPlace{-1, 0};
        votes[r] = __ballot_sync(kWarp, places[r].band == static_cast<int>(blockIdx.z));
        if (lane == 0) counts[r * kWarps + warp] = __popc(votes[r]);
    }
    __syncthreads();
    int total = 0;
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
        for (int w = 0; w < kWarps; ++w) {
            if (w == warp && (votes[r] >> lane & 1)) {
                const int at = total + __popc(votes[r] & ((1u << lane) - 1));
                rows[at] = places[r].row;
                members[at] = r * kGemmThreads + static_cast<int>(threadIdx.x);
            }
            total += counts[r * kWarps + w];
        }
    }
    __syncthreads();

    const T* table = static_cast<const T*>(band.table);
    const T* projection = static_cast<const T*>(band.projection);
    const int64_t column = static_cast<int64_t>(blockIdx.y) * kGemmTile, D = p.embedding_dim;
    for (int start = 0; start < total; start += kGemmTile) {
        Gemm gemm;
        gemm.run(
            shared, 0, band.width, table, projection, whole_rows(table, band.stride, band.width, sizeof(T)),
            whole_rows(projection, band.width, band.width, sizeof(T)),
            [&](int64_t i) {
                return Line<T>{start + i < total ? table + rows[start + i] * band.stride : nullptr,
                               band.width};
            },
            [&](int64_t j) {
                return Line<T>{column + j < D ? projection + (column + j) * band.width : nullptr, band.width};
            });
        gemm.each([&](int i, int j, float value) {
            if (start + i < total && column + j < D)
                static_cast<T*>(p.out)[(first + members[start + i]) * D + column + j] = from_float<T>(value);
        });
    }
}

}  // namespace

const char* variable_width_embedding(const EmbedParams& p, int32_t device, void* stream) {
    if (p.count * p.embedding_dim == 0) return nullptr;
    bool projected = false;
    for (int b = 0; b < p.band_count; ++b) projected = projected || p.bands[b].projection;
    return with_type(p.dtype, [&](auto type) -> const char* {
        using T = decltype(type);
        const char* error = launch(copy_rows_kernel<T>, static_cast<unsigned>(divide_up(p.count, kCopyWarps)),
                                   32 * kCopyWarps, 0, device, stream, p);
        if (error || !projected) return error;
        const dim3 grid(static_cast<unsigned>(divide_up(p.count, kPositions)),
                        static_cast<unsigned>(divide_up(p.embedding_dim, kGemmTile)),
                        static_cast<unsigned>(p.band_count));
        constexpr int kShared =
            GatheredGemm<T, false, false>::kShared + 12 * kPositions + 4 * (kPositions / 32);
        return launch(project_rows_kernel<T>, grid, kGemmThreads, kShared, device, stream, p);
    });
}

}  // namespace sparse_attn::cuda
