// The host side of variable_width_embedding: ids grouped by band and by distinct row in one pass, then tasks
// for the kernels. Arguments are validated in Python first, with better words; the checks here keep a direct
// call of an op from reading or writing out of bounds.
#include "cpu/kernels/variable_width_embedding.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/tasks.h"

SPARSE_ATTN_FIND_KERNELS(variable_width_embedding, EmbeddingKernels)
SPARSE_ATTN_FIND_KERNELS(variable_width_embedding_backward, EmbeddingBackwardKernels)

namespace sparse_attn {
namespace {

using cpu::EmbeddingKernels;
using cpu::Range;
using cpu::RowsTask;

// Bands with fewer distinct rows than this are projected by dot products: packing the projection costs more.
constexpr int64_t kFewRows = 6;

// Multiply-adds and numbers written from which on other threads are woken: a call has up to three rounds of
// tasks.
constexpr double kWorthThreads = 2e6;

bool is_index(const Tensor& t) {
    return t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long;
}

// int32 or int64, contiguous.
struct Integers {
    const void* data;
    bool wide;
    explicit Integers(const Tensor& t)
        : data(t.const_data_ptr()), wide(t.scalar_type() == ScalarType::Long) {}
    int64_t operator[](int64_t i) const {
        return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    }
};

// Which rows occur, and where. Within a band they stand in the order of their first position, or by row.
struct Groups {
    std::vector<int64_t> band_start;  // [B + 1] into the distinct rows
    std::vector<int64_t> row;         // [distinct]
    std::vector<int64_t> starts;      // [distinct + 1] into positions
    std::vector<int64_t> positions;   // [grouped], ascending within a row
};

// A row of some table → its number in the order of first occurrence: a plain array where the tables have no
// more rows than some multiple of the ids, else a hash table, so that few ids of a large vocabulary cost
// little.
class Numbering {
  public:
    Numbering(int64_t ids, int64_t rows) {
        int64_t size = 16;
        while (size < 2 * ids) size *= 2, ++bits_;
        direct_ = rows <= 4 * size;
        numbers_.assign(direct_ ? rows : size, -1);
        keys_.reserve(std::min(ids, rows));
    }
    int64_t operator()(int64_t key) {
        int64_t at = direct_ ? key : hash(key);
        while (!direct_ && numbers_[at] >= 0 && keys_[numbers_[at]] != key)
            at = at + 1 == static_cast<int64_t>(numbers_.size()) ? 0 : at + 1;
        if (numbers_[at] < 0) {
            numbers_[at] = static_cast<int32_t>(keys_.size());
            keys_.push_back(key);
        }
        return numbers_[at];
    }

  private:
    int64_t hash(int64_t key) const {
        return static_cast<int64_t>((static_cast<uint64_t>(key) * 0x9E3779B97F4A7C15u) >> (64 - bits_));
    }
    int bits_ = 4;
    bool direct_;
    std::vector<int64_t> keys_;     // by number
    std::vector<int32_t> numbers_;  // by key or hash, −1 where there is none
};

// Output of at least this many bytes passes the caches by: it would not stay in them.
constexpr int64_t kLargeOutput = int64_t{8} << 20;

struct Call {
    EmbeddingParams params{};
    std::vector<EmbeddingBand> bands;
    std::vector<Tensor> tables, projections;  // with contiguous rows, for as long as the call lasts
    std::vector<Memory> memory;
    Tensor ids, token_band, token_row;  // contiguous
    int64_t padding_idx;
    Groups groups;
    int64_t count;  // N
    bool parallel;

    float* scratch(int64_t floats) {
        memory.push_back(allocate(floats * 4));
        prefer_large_pages(memory.back().get(), floats * 4);
        return reinterpret_cast<float*>(memory.back().get());
    }
};

// What an id stands for; its band is kPadding for padding_idx.
constexpr int64_t kPadding = -1;
struct Place {
    int64_t band, row;
};

class Places {
  public:
    Places(const Call& c, const char* op)
        : op_(op),
          id_(c.ids),
          row_of_(c.token_row),
          band_of_(static_cast<const int32_t*>(c.token_band.const_data_ptr())),
          vocabulary_(c.token_band.numel()),
          padding_idx_(c.padding_idx) {
        for (const Tensor& table : c.tables) sizes_.push_back(table.size(0));
    }
    Place operator[](int64_t position) const {
        const int64_t token = id_[position];
        STD_TORCH_CHECK(token >= 0 && token < vocabulary_, op_, ": id ", token, " at flat position ",
                        position, " is outside the vocabulary of ", vocabulary_);
        if (token == padding_idx_) return {kPadding, 0};
        const int64_t band = band_of_[token], row = row_of_[token], bands = sizes_.size();
        STD_TORCH_CHECK(band >= 0 && band < bands && row >= 0 && row < sizes_[band], op_, ": token ", token,
                        " is mapped to row ", row, " of band ", band, ", which does not exist");
        return {band, row};
    }

  private:
    const char* op_;
    Integers id_, row_of_;
    const int32_t* band_of_;
    int64_t vocabulary_, padding_idx_;
    std::vector<int64_t> sizes_;
};

// Checks all ids; groups the positions of all bands, or with `projected` of those with a projection alone.
void group(Call& c, const char* op, bool projected, bool by_row) {
    const int64_t n = c.count, bands = c.bands.size();
    const Places place(c, op);
    Groups& g = c.groups;
    std::vector<int64_t> offset(bands, 0);  // of a table's rows among the rows of all
    for (int64_t b = 1; b < bands; ++b) offset[b] = offset[b - 1] + c.tables[b - 1].size(0);
    Numbering numbering(n, offset.back() + c.tables.back().size(0));
    struct Row {
        int64_t band, row, count;
    };
    std::vector<Row> rows;  // by number
    std::vector<int64_t> number(n);
    g.band_start.assign(bands + 1, 0);
    for (int64_t i = 0; i < n; ++i) {
        const auto [band, row] = place[i];
        if (band == kPadding || (projected && !c.bands[band].projection)) {
            number[i] = -1;
            continue;
        }
        const int64_t u = number[i] = numbering(offset[band] + row);
        if (u == static_cast<int64_t>(rows.size())) {
            rows.push_back({band, row, 0});
            ++g.band_start[band + 1];
        }
        ++rows[u].count;
    }
    const int64_t distinct = rows.size();
    for (int64_t b = 0; b < bands; ++b) g.band_start[b + 1] += g.band_start[b];
    std::vector<int64_t> next(g.band_start.begin(), g.band_start.end() - 1), order(distinct);
    for (int64_t u = 0; u < distinct; ++u) order[next[rows[u].band]++] = u;
    if (by_row)
        for (int64_t b = 0; b < bands; ++b)
            std::sort(order.begin() + g.band_start[b], order.begin() + g.band_start[b + 1],
                      [&](int64_t x, int64_t y) { return rows[x].row < rows[y].row; });
    g.row.resize(distinct);
    g.starts.assign(distinct + 1, 0);
    for (int64_t s = 0; s < distinct; ++s) {
        Row& r = rows[order[s]];
        g.row[s] = r.row;
        g.starts[s + 1] = g.starts[s] + r.count;
        r.count = g.starts[s];  // from here on: where the next position goes
    }
    g.positions.resize(g.starts.back());
    for (int64_t i = 0; i < n; ++i)
        if (number[i] >= 0) g.positions[rows[number[i]].count++] = i;

    EmbeddingParams& p = c.params;
    double work = static_cast<double>(n) * p.embedding_dim;
    for (int64_t b = 0; b < bands; ++b) {
        EmbeddingBand& e = c.bands[b];
        e.first = g.band_start[b], e.last = g.band_start[b + 1];
        if (e.projection) work += static_cast<double>(e.last - e.first) * e.width * p.embedding_dim;
    }
    c.parallel = work > kWorthThreads;
    p.bands = c.bands.data();
    p.row = g.row.data();
    p.starts = g.starts.data();
    p.positions = g.positions.data();
}

// Checks, and everything that forward and backward share.
void prepare(Call& c, const char* op, const Tensor& ids, const std::vector<Tensor>& tables,
             const std::vector<Tensor>& projections, const Tensor& token_band, const Tensor& token_row,
             int64_t padding_idx) {
    STD_TORCH_CHECK(!tables.empty() && tables.size() == projections.size(), op,
                    ": takes one projection (possibly without elements) for each table");
    STD_TORCH_CHECK(is_index(ids) && is_index(token_row) && token_band.scalar_type() == ScalarType::Int &&
                        token_band.numel() == token_row.numel() &&
                        token_band.numel() <= std::numeric_limits<int32_t>::max(),
                    op, ": takes int32 or int64 ids and token_row, and int32 token_band; got token_band ",
                    shape_of(token_band), " and token_row ", shape_of(token_row));
    EmbeddingParams& p = c.params;
    p.dtype = dtype_of(op, tables[0]);
    p.embedding_dim = projections[0].numel() ? projections[0].size(0) : tables[0].size(1);
    for (size_t b = 0; b < tables.size(); ++b) {
        const Tensor &table = tables[b], &projection = projections[b];
        const bool projected = projection.numel() > 0;
        STD_TORCH_CHECK(table.dim() == 2 && table.scalar_type() == tables[0].scalar_type() &&
                            projection.scalar_type() == tables[0].scalar_type() &&
                            (projected ? projection.dim() == 2 && projection.size(0) == p.embedding_dim &&
                                             projection.size(1) == table.size(1)
                                       : table.size(1) == p.embedding_dim),
                        op, ": table ", b, " [n, width] and its projection [D, width] do not agree; got ",
                        shape_of(table), " and ", shape_of(projection));
        c.tables.push_back(table.stride(1) == 1 ? table : torch::stable::contiguous(table));
        c.projections.push_back(torch::stable::contiguous(projection));
        EmbeddingBand e{};
        e.table = c.tables[b].const_data_ptr();
        e.table_stride = c.tables[b].stride(0);
        e.width = table.size(1);
        e.projection = projected ? c.projections[b].const_data_ptr() : nullptr;
        if (projected) p.widest = std::max(p.widest, e.width);
        c.bands.push_back(e);
    }
    c.ids = torch::stable::contiguous(ids);
    c.token_band = torch::stable::contiguous(token_band);
    c.token_row = torch::stable::contiguous(token_row);
    c.padding_idx = padding_idx;
    c.count = ids.numel();
}

void pack_projections(Call& c, bool backward, int64_t least_rows) {
    const EmbeddingKernels& k = cpu::variable_width_embedding_kernels();
    const EmbeddingParams& p = c.params;
    struct Task {
        int64_t band;
        Range panels;
    };
    std::vector<Task> tasks;
    for (size_t b = 0; b < c.bands.size(); ++b) {
        EmbeddingBand& e = c.bands[b];
        if (!e.projection || e.last - e.first < least_rows) continue;
        const int64_t band = b;
        e.packed = c.scratch(k.packed_bytes(p, band, backward) / 4);
        for (int64_t n = 0; n < k.panels(p, band, backward); ++n) tasks.push_back({band, {n, n + 1}});
    }
    for_each_task(tasks.size(), 64, c.parallel,
                  [&](int64_t i, char*) { k.pack(p, tasks[i].band, backward, tasks[i].panels); });
}

int64_t element_bytes(const EmbeddingParams& p) {
    return p.dtype == DType::kFloat32 ? 4 : 2;
}

// Zeros in all of the gradients that are as large as their tables.
void clear_grad_tables(const Call& c) {
    constexpr int64_t kChunk = int64_t{1} << 20;
    struct Chunk {
        char* begin;
        int64_t bytes;
    };
    std::vector<Chunk> chunks;
    for (size_t b = 0; b < c.bands.size(); ++b) {
        const EmbeddingBand& e = c.bands[b];
        if (!e.grad_table || e.grad_rows) continue;
        const int64_t bytes = c.tables[b].size(0) * e.width * element_bytes(c.params);
        prefer_large_pages(e.grad_table, bytes);
        for (int64_t at = 0; at < bytes; at += kChunk)
            chunks.push_back({static_cast<char*>(e.grad_table) + at, std::min(kChunk, bytes - at)});
    }
    for_each_task(chunks.size(), 64, chunks.size() > 1,
                  [&](int64_t i, char*) { std::memset(chunks[i].begin, 0, chunks[i].bytes); });
}

// Tasks of at most kEmbeddingBlock distinct rows with not too many positions: ids follow Zipf's law, and a
// few rows can have most of the positions. How rows are divided changes no result.
std::vector<RowsTask> blocks_of(const Call& c) {
    const int64_t most = std::max<int64_t>(
        256, c.count / (8 * (c.parallel ? static_cast<int64_t>(torch::stable::get_num_threads()) : 1)));
    std::vector<RowsTask> found;
    for (size_t b = 0; b < c.bands.size(); ++b)
        for (int64_t u = c.bands[b].first; u < c.bands[b].last;) {
            int64_t end = u + 1;
            while (end < c.bands[b].last && end - u < kEmbeddingBlock &&
                   c.groups.starts[end + 1] - c.groups.starts[u] <= most)
                ++end;
            found.push_back({static_cast<int64_t>(b), {u, end}});
            u = end;
        }
    return found;
}

// Positions [begin, end) whose rows need no projection, and zeros for padding_idx.
void copy_rows(const Call& c, const char* op, int64_t begin, int64_t end) {
    constexpr int64_t kAhead = 2;  // rows lie anywhere in the table: their first lines are fetched this early
    const EmbeddingParams& p = c.params;
    const Places place(c, op);
    const int64_t element = element_bytes(p), bytes = p.embedding_dim * element;
    const bool around_caches = c.count * bytes >= kLargeOutput;
    char* out = static_cast<char*>(p.out);
    auto source = [&](int64_t i) -> const char* {  // nullptr: not copied
        const auto [band, row] = place[i];
        if (band == kPadding || c.bands[band].projection) return nullptr;
        const EmbeddingBand& e = c.bands[band];
        return static_cast<const char*>(e.table) + row * e.table_stride * element;
    };
    for (int64_t i = begin; i < end; ++i) {
        const char* next = i + kAhead < end ? source(i + kAhead) : nullptr;
        for (int64_t byte = 0; next && byte < std::min<int64_t>(bytes, 4096); byte += 64)
            __builtin_prefetch(next + byte);
        const char* from = source(i);
        if (from && around_caches)
            copy_around_caches(out + i * bytes, from, bytes);
        else if (from)
            std::memcpy(out + i * bytes, from, bytes);
        else if (place[i].band == kPadding)
            std::memset(out + i * bytes, 0, bytes);
    }
    if (around_caches) finish_copies();
}

// out [*ids.shape, D]. A projection without elements stands for none.
Tensor variable_width_embedding_cpu(Tensor ids, std::vector<Tensor> tables, std::vector<Tensor> projections,
                                    Tensor token_band, Tensor token_row, int64_t padding_idx, bool sparse) {
    (void)sparse;  // of the gradients
    const char* op = "variable_width_embedding.cpu";
    Call c;
    prepare(c, op, ids, tables, projections, token_band, token_row, padding_idx);
    EmbeddingParams& p = c.params;
    std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
    shape.push_back(p.embedding_dim);
    Tensor out = torch::stable::new_empty(tables[0], shape);
    if (out.numel() == 0) return out;
    p.out = out.mutable_data_ptr();
    const int64_t row_bytes = p.embedding_dim * element_bytes(p);
    prefer_large_pages(p.out, c.count * row_bytes);
    group(c, op, true, false);
    pack_projections(c, false, kFewRows);
    // Copies and products in turn: threads that all write to fresh memory at once wait for the system.
    const EmbeddingKernels& k = cpu::variable_width_embedding_kernels();
    const std::vector<RowsTask> products = blocks_of(c);
    const int64_t chunk = std::max<int64_t>(1, kLargePage / row_bytes);
    const int64_t copies = blocks(c.count, chunk), tasks = copies + static_cast<int64_t>(products.size());
    for_each_task(tasks, k.project.scratch_bytes(p), c.parallel, [&](int64_t i, char* scratch) {
        const int64_t copy = (i * copies + tasks - 1) / tasks;  // of the copies, those before task i
        if ((i + 1) * copies > copy * tasks)
            return copy_rows(c, op, copy * chunk, std::min(c.count, (copy + 1) * chunk));
        k.project.run(p, products[i - copy], scratch);
    });
    return out;
}

// (grad_tables, grad_projections, rows): each B tensors or none. With `sparse`, grad_tables[b] [distinct,
// width] belongs to the table's rows rows[b] [distinct], which ascend.
std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>
variable_width_embedding_backward_cpu(Tensor grad_out, Tensor ids, std::vector<Tensor> tables,
                                      std::vector<Tensor> projections, Tensor token_band, Tensor token_row,
                                      int64_t padding_idx, bool sparse, bool need_tables,
                                      bool need_projections) {
    const char* op = "variable_width_embedding_backward.cpu";
    Call c;
    prepare(c, op, ids, tables, projections, token_band, token_row, padding_idx);
    group(c, op, false, sparse && need_tables);
    EmbeddingParams& p = c.params;
    STD_TORCH_CHECK(
        grad_out.scalar_type() == tables[0].scalar_type() && grad_out.numel() == c.count * p.embedding_dim,
        op, ": grad_out must be [*ids.shape, D] in the tables' dtype; got ", shape_of(grad_out));
    grad_out = torch::stable::contiguous(grad_out);
    p.grad_out = grad_out.const_data_ptr();
    const EmbeddingKernels& k = cpu::variable_width_embedding_kernels();
    std::vector<Tensor> grad_tables, grad_projections, rows;
    for (size_t b = 0; b < c.bands.size(); ++b) {
        EmbeddingBand& e = c.bands[b];
        const int64_t hit = e.last - e.first;
        if (need_tables) {
            grad_tables.push_back(
                torch::stable::new_empty(tables[b], {sparse ? hit : tables[b].size(0), e.width}));
            e.grad_table = grad_tables.back().mutable_data_ptr();
            e.grad_rows = sparse;
            if (sparse) {
                rows.push_back(torch::stable::new_empty(tables[b], {hit}, ScalarType::Long));
                std::copy(p.row + e.first, p.row + e.last,
                          static_cast<int64_t*>(rows.back().mutable_data_ptr()));
            }
        }
        if (!need_projections) continue;
        grad_projections.push_back(
            torch::stable::new_empty(projections[b], {projections[b].size(0), projections[b].size(1)}));
        if (!e.projection) continue;
        e.grad_projection = grad_projections.back().mutable_data_ptr();
        e.sums = c.scratch(hit * p.embedding_dim);
        e.rows = c.scratch(hit * k.padded_width(e.width));
    }
    clear_grad_tables(c);
    if (need_tables) pack_projections(c, true, 1);
    const std::vector<RowsTask> tasks = blocks_of(c);
    const cpu::EmbeddingBackwardKernels& backward = cpu::variable_width_embedding_backward_kernels();
    const int64_t bytes = backward.rows.scratch_bytes(p);
    for_each_task(tasks.size(), bytes, c.parallel, [&](int64_t i, char* scratch) {
        if (need_tables || c.bands[tasks[i].band].grad_projection) backward.rows.run(p, tasks[i], scratch);
    });
    std::vector<RowsTask> strips;
    for (size_t b = 0; b < c.bands.size(); ++b)
        for (int64_t d = 0; c.bands[b].grad_projection && d < p.embedding_dim; d += kEmbeddingBlock)
            strips.push_back({static_cast<int64_t>(b), {d, std::min(p.embedding_dim, d + kEmbeddingBlock)}});
    for_each_task(strips.size(), bytes, c.parallel, [&](int64_t i, char* scratch) {
        backward.projection(p, strips[i].band, strips[i].distinct, scratch);
    });
    return {grad_tables, grad_projections, rows};
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def(
        "variable_width_embedding.cpu(Tensor ids, Tensor[] tables, Tensor[] projections, Tensor token_band, "
        "Tensor token_row, int padding_idx, bool sparse) -> Tensor out");
    m.def(
        "variable_width_embedding_backward.cpu(Tensor grad_out, Tensor ids, Tensor[] tables, "
        "Tensor[] projections, Tensor token_band, Tensor token_row, int padding_idx, bool sparse, "
        "bool need_tables, bool need_projections) "
        "-> (Tensor[] grad_tables, Tensor[] grad_projections, Tensor[] rows)");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
    m.impl("variable_width_embedding.cpu", TORCH_BOX(&sparse_attn::variable_width_embedding_cpu));
    m.impl("variable_width_embedding_backward.cpu",
           TORCH_BOX(&sparse_attn::variable_width_embedding_backward_cpu));
}
