#include "cpu/token_counts.h"

#include <algorithm>
#include <vector>

#include "cpu/tasks.h"

namespace sparse_attn {
namespace {

constexpr int64_t kPiece = 1 << 18;  // tokens of one task

// In a text the same few ids come again and again, and a counter that was just written is slow to read:
// neighbours count into different tables.
constexpr int64_t kTables = 2;

template <class Id>
void count_piece(const Id* tokens, int64_t n, int64_t bins, uint32_t* tables) {
    const uint32_t last = static_cast<uint32_t>(bins - 1);  // where the ids out of range go
    int64_t i = 0;
    for (; i + kTables <= n; i += kTables)
        for (int64_t j = 0; j < kTables; ++j) ++tables[j * bins + std::min<uint32_t>(tokens[i + j], last)];
    for (; i < n; ++i) ++tables[std::min<uint32_t>(tokens[i], last)];
}

template <class Id>
int64_t count(const Id* tokens, int64_t n, int64_t vocabulary, int64_t* counts) {
    const int64_t bins = vocabulary + 1;
    const int64_t pieces = blocks(n, kPiece);
    // No more threads than pay for their tables.
    const int64_t most = std::max<int64_t>(1, n / (kTables * bins));
    const int64_t threads = std::min({int64_t{torch::stable::get_num_threads()}, pieces, most});
    if (threads == 0) return -1;
    std::vector<std::vector<uint32_t>> tables(threads, std::vector<uint32_t>(kTables * bins));
    std::atomic<int64_t> next{0};
    for_each_task(threads, 0, threads > 1, [&](int64_t thread, char*) {
        for (int64_t p = next++; p < pieces; p = next++)
            count_piece(tokens + p * kPiece, std::min(kPiece, n - p * kPiece), bins, tables[thread].data());
    });
    int64_t outside = 0;
    for (const auto& table : tables)
        for (int64_t j = 0; j < kTables; ++j) {
            const uint32_t* row = table.data() + j * bins;
            for (int64_t v = 0; v < vocabulary; ++v) counts[v] += row[v];
            outside += row[vocabulary];
        }
    if (outside == 0) return -1;
    return std::find_if(tokens, tokens + n, [&](Id id) { return int64_t{id} >= vocabulary; }) - tokens;
}

template <class Id>
int64_t largest(const Id* tokens, int64_t n) {
    const int64_t pieces = blocks(n, kPiece);
    std::vector<int64_t> found(pieces, -1);
    for_each_task(pieces, 0, pieces > 1, [&](int64_t p, char*) {
        const Id* piece = tokens + p * kPiece;
        Id most = 0;
        for (int64_t i = 0; i < std::min(kPiece, n - p * kPiece); ++i) most = std::max(most, piece[i]);
        found[p] = most;
    });
    return pieces == 0 ? -1 : *std::max_element(found.begin(), found.end());
}

}  // namespace

int64_t count_tokens(const uint16_t* tokens, int64_t n, int64_t vocabulary, int64_t* counts) {
    return count(tokens, n, vocabulary, counts);
}
int64_t count_tokens(const uint32_t* tokens, int64_t n, int64_t vocabulary, int64_t* counts) {
    return count(tokens, n, vocabulary, counts);
}
int64_t largest_token(const uint16_t* tokens, int64_t n) {
    return largest(tokens, n);
}
int64_t largest_token(const uint32_t* tokens, int64_t n) {
    return largest(tokens, n);
}

}  // namespace sparse_attn
