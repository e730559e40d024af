// variable_width_cross_entropy on the CPU: from torch's tensors to the kernels, and the threads that run
// them.
//
// Work is cut into tiles of classes, each of which goes through all blocks of tokens; neither cut depends on
// the number of threads. Scratch: packed projected hidden states, 4 bytes × N × Σ width forward and 12
// backward, about 1 MB a thread, and 12 bytes × N for each of at most 64 runs of tiles.
#include "cpu/kernels/variable_width_cross_entropy.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <thread>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/tasks.h"

SPARSE_ATTN_FIND_KERNELS(variable_width_cross_entropy, CrossEntropyKernels)
SPARSE_ATTN_FIND_KERNELS(variable_width_cross_entropy_backward, CrossEntropyBackwardKernels)

namespace sparse_attn {
namespace {

using cpu::ClassTile;

float* floats(const Memory& memory) {
    return reinterpret_cast<float*>(memory.get());
}

struct Problem {
    CrossEntropyParams p{};
    std::vector<CrossEntropyBand> bands;
    std::vector<Tensor> kept;  // contiguous copies that the pointers above refer to
    std::vector<int64_t> token, target;
    std::vector<float> class_weight, target_weight;  // [V + padding], [N]
    std::vector<Memory> buffers;
    std::vector<ClassTile> tiles;
    int64_t classes = 0, blocks = 0, padded = 0;
    double total_weight = 0, smoothing = 0;
    bool parallel = false;

    const void* keep(const Tensor& tensor) {
        kept.push_back(torch::stable::contiguous(tensor));
        return kept.back().const_data_ptr();
    }
    float* buffer(int64_t count) {
        buffers.push_back(allocate(4 * count));
        return floats(buffers.back());
    }
};

void add_bands(Problem& s, const char* op, const Tensor& hidden, const std::vector<Tensor>& tables,
               const std::vector<Tensor>& projections) {
    const int64_t dim = hidden.size(1);
    STD_TORCH_CHECK(tables.size() > 0 && tables.size() == projections.size(), op,
                    ": tables and projections must have one entry per band; got ", tables.size(), " and ",
                    projections.size());
    for (size_t b = 0; b < tables.size(); ++b) {
        const Tensor& table = tables[b];
        STD_TORCH_CHECK(table.dim() == 2 && table.size(1) > 0 && table.scalar_type() == hidden.scalar_type(),
                        op, ": tables[", b, "] must be [n, width] in hidden's dtype; got ", shape_of(table));
        CrossEntropyBand band{};
        band.rows = table.size(0), band.width = table.size(1), band.first = s.classes;
        const Tensor& projection = projections[b];
        if (projection.numel() > 0) {
            STD_TORCH_CHECK(projection.dim() == 2 && projection.size(0) == dim &&
                                projection.size(1) == band.width &&
                                projection.scalar_type() == hidden.scalar_type(),
                            op, ": projections[", b, "] must be [D, width] in hidden's dtype; got ",
                            shape_of(projection));
            band.projection = s.keep(projection);
        }
        STD_TORCH_CHECK(band.projection || band.width == dim, op, ": tables[", b,
                        "] needs a projection: its width is not that of hidden; got ", shape_of(table));
        band.table = s.keep(table);
        s.classes += band.rows;
        s.bands.push_back(band);
    }
}

// Reads the map of the tokens, and of each target its class number; which rows of hidden count.
void add_targets(Problem& s, const char* op, const Tensor& targets, const Tensor& token_band,
                 const Tensor& token_row, const std::optional<Tensor>& weight, int64_t ignore_index) {
    const int64_t classes = s.classes, band_count = static_cast<int64_t>(s.bands.size());
    const bool maps = token_band.dim() == 1 && token_row.dim() == 1 && token_band.size(0) == classes &&
                      token_row.size(0) == classes && token_band.scalar_type() == ScalarType::Int &&
                      token_row.scalar_type() == ScalarType::Int;
    STD_TORCH_CHECK(maps, op, ": token_band and token_row must be int32 [V] with V = ", classes,
                    ", the rows of all tables; got ", shape_of(token_band), " and ", shape_of(token_row));
    const auto* band_of = static_cast<const int32_t*>(s.keep(token_band));
    const auto* row_of = static_cast<const int32_t*>(s.keep(token_row));
    const float* weight_of = nullptr;
    if (weight) {
        STD_TORCH_CHECK(
            weight->dim() == 1 && weight->size(0) == classes && weight->scalar_type() == ScalarType::Float,
            op, ": weight must be float32 [V]; got ", shape_of(*weight));
        weight_of = static_cast<const float*>(s.keep(*weight));
    }
    s.total_weight = static_cast<double>(classes);
    if (s.smoothing > 0) s.class_weight.assign(classes + 64, 1.0f);
    if (weight_of) {
        s.total_weight = 0;
        for (int64_t v = 0; v < classes; ++v) s.total_weight += weight_of[v];
    }
    std::vector<bool> taken(classes, false);
    for (int64_t v = 0; v < classes; ++v) {
        const int64_t b = band_of[v], row = row_of[v];
        STD_TORCH_CHECK(b >= 0 && b < band_count && row >= 0 && row < s.bands[b].rows, op, ": token ", v,
                        " is mapped to row ", row, " of band ", b, ", which does not exist");
        const int64_t c = s.bands[b].first + row;
        STD_TORCH_CHECK(!taken[c], op, ": row ", row, " of band ", b, " belongs to two tokens, one is ", v);
        taken[c] = true;
        if (s.smoothing > 0 && weight_of) s.class_weight[c] = weight_of[v];
    }
    const auto* target = static_cast<const int64_t*>(s.keep(targets));
    for (int64_t i = 0; i < targets.size(0); ++i) {
        const int64_t t = target[i];
        if (t == ignore_index) continue;
        STD_TORCH_CHECK(t >= 0 && t < classes, op, ": target ", t, " at position ", i,
                        " is outside of the vocabulary of ", classes);
        s.token.push_back(i);
        s.target.push_back(s.bands[band_of[t]].first + row_of[t]);
        s.target_weight.push_back(weight_of ? weight_of[t] : 1.0f);
    }
}

void prepare(Problem& s, const char* op, const Tensor& hidden, const Tensor& targets,
             const std::vector<Tensor>& tables, const std::vector<Tensor>& projections,
             const Tensor& token_band, const Tensor& token_row, const std::optional<Tensor>& weight,
             int64_t ignore_index, double label_smoothing) {
    STD_TORCH_CHECK(hidden.dim() == 2 && targets.dim() == 1 && hidden.size(0) == targets.size(0) &&
                        targets.scalar_type() == ScalarType::Long,
                    op, ": hidden must be [N, D] and targets int64 [N]; got ", shape_of(hidden), " and ",
                    shape_of(targets));
    STD_TORCH_CHECK(label_smoothing >= 0 && label_smoothing <= 1, op,
                    ": label_smoothing must be from 0 to 1; got ", label_smoothing);
    CrossEntropyParams& p = s.p;
    p.dtype = dtype_of(op, hidden);
    s.smoothing = label_smoothing;
    add_bands(s, op, hidden, tables, projections);
    add_targets(s, op, targets, token_band, token_row, weight, ignore_index);
    p.hidden = s.keep(hidden);
    p.embedding_dim = hidden.size(1);
    p.bands = s.bands.data();
    p.band_count = static_cast<int64_t>(s.bands.size());
    p.tokens = static_cast<int64_t>(s.token.size());
    p.token = s.token.data();
    p.target = s.target.data();
    p.class_weight = s.smoothing > 0 ? s.class_weight.data() : nullptr;
    s.blocks = blocks(p.tokens, kTokenBlock);
    s.padded = s.blocks * kTokenBlock;
    double work = 0;
    for (const CrossEntropyBand& band : s.bands) work += static_cast<double>(band.rows) * band.width;
    s.parallel = worth_threads(work * p.tokens);
}

// The tiles of all bands, each band's in order; bands take turns, so that threads meet in one band less.
void make_tiles(Problem& s) {
    struct Place {
        double at;
        ClassTile tile;
    };
    std::vector<Place> places;
    const cpu::CrossEntropyKernels& k = cpu::variable_width_cross_entropy_kernels();
    for (size_t b = 0; b < s.bands.size(); ++b) {
        const int64_t rows = s.bands[b].rows, size = k.tile_classes(s.bands[b].width);
        for (int64_t begin = 0; begin < rows; begin += size)
            places.push_back({static_cast<double>(begin) / rows,
                              {static_cast<int64_t>(b), begin, std::min(rows, begin + size)}});
    }
    std::stable_sort(places.begin(), places.end(),
                     [](const Place& a, const Place& b) { return a.at < b.at; });
    for (const Place& place : places) s.tiles.push_back(place.tile);
}

// Projects every block once per band: the rows of A, and for the backward the columns of B.
void project(Problem& s, bool backward) {
    const cpu::CrossEntropyKernels& k = cpu::variable_width_cross_entropy_kernels();
    for (CrossEntropyBand& band : s.bands) {
        const int64_t padded = k.padded_width(band.width);
        band.projected = s.buffer(s.padded * padded);
        if (!backward) continue;
        band.projected_cols = s.buffer(s.padded * padded);
        band.grad_projected = s.buffer(s.padded * padded);
    }
    for_each_task(s.p.band_count * s.blocks, k.project_scratch_bytes(s.p), s.parallel,
                  [&](int64_t i, char* scratch) { k.project(s.p, i / s.blocks, i % s.blocks, scratch); });
}

// (loss [N], lse [N]), float32; 0 where the target is ignore_index. A projection [0, 0] stands for none.
std::tuple<Tensor, Tensor> variable_width_cross_entropy_cpu(Tensor hidden, Tensor targets,
                                                            std::vector<Tensor> tables,
                                                            std::vector<Tensor> projections,
                                                            Tensor token_band, Tensor token_row,
                                                            std::optional<Tensor> weight,
                                                            int64_t ignore_index, double label_smoothing) {
    Problem s;
    prepare(s, "variable_width_cross_entropy.cpu", hidden, targets, tables, projections, token_band,
            token_row, weight, ignore_index, label_smoothing);
    const int64_t count = targets.size(0);
    Tensor loss = torch::stable::new_empty(hidden, {count}, ScalarType::Float);
    Tensor lse = torch::stable::new_empty(hidden, {count}, ScalarType::Float);
    if (count == 0) return {loss, lse};
    auto* losses = static_cast<float*>(loss.mutable_data_ptr());
    auto* lses = static_cast<float*>(lse.mutable_data_ptr());
    std::memset(losses, 0, count * sizeof(float));
    std::memset(lses, 0, count * sizeof(float));
    CrossEntropyParams& p = s.p;
    if (p.tokens == 0) return {loss, lse};

    make_tiles(s);
    project(s, false);
    const int64_t tile_count = static_cast<int64_t>(s.tiles.size());
    const int64_t segments = std::min(kVocabSegments, tile_count);
    p.partial_max = s.buffer(segments * s.padded);
    p.partial_sum = s.buffer(segments * s.padded);
    p.partial_dot = s.smoothing > 0 ? s.buffer(segments * s.padded) : nullptr;
    p.target_logit = s.buffer(s.padded);
    std::fill_n(p.partial_max, segments * s.padded, -std::numeric_limits<float>::infinity());
    std::fill_n(p.partial_sum, segments * s.padded, 0.0f);
    if (p.partial_dot) std::fill_n(p.partial_dot, segments * s.padded, 0.0f);

    const cpu::CrossEntropyKernels& k = cpu::variable_width_cross_entropy_kernels();
    for_each_task(segments, k.scratch_bytes(p), s.parallel, [&](int64_t i, char* scratch) {
        for (int64_t t = tile_count * i / segments; t < tile_count * (i + 1) / segments; ++t) {
            k.begin(p, s.tiles[t], scratch);
            for (int64_t block = 0; block < s.blocks; ++block) k.block(p, s.tiles[t], i, block, scratch);
        }
    });
    const double smooth = s.smoothing / static_cast<double>(s.classes);
    for_each_task(s.blocks, 64, s.parallel, [&](int64_t block, char*) {
        for (int64_t n = block * kTokenBlock; n < std::min(p.tokens, (block + 1) * kTokenBlock); ++n) {
            float peak = -std::numeric_limits<float>::infinity();
            for (int64_t i = 0; i < segments; ++i) peak = std::max(peak, p.partial_max[i * s.padded + n]);
            double sum = 0, dot = 0;
            for (int64_t i = 0; i < segments; ++i) {
                sum += p.partial_sum[i * s.padded + n] * std::exp(p.partial_max[i * s.padded + n] - peak);
                if (p.partial_dot) dot += p.partial_dot[i * s.padded + n];
            }
            const double whole = peak + std::log(sum);
            double value = s.target_weight[n] * (1 - s.smoothing) * (whole - p.target_logit[n]);
            if (s.smoothing > 0) value += smooth * (s.total_weight * whole - dot);
            losses[p.token[n]] = static_cast<float>(value);
            lses[p.token[n]] = static_cast<float>(whole);
        }
    });
    return {loss, lse};
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> variable_width_cross_entropy_backward_cpu(
    Tensor grad_loss, Tensor grad_lse, Tensor hidden, Tensor targets, std::vector<Tensor> tables,
    std::vector<Tensor> projections, Tensor token_band, Tensor token_row, std::optional<Tensor> weight,
    Tensor lse, int64_t ignore_index, double label_smoothing) {
    const char* op = "variable_width_cross_entropy_backward.cpu";
    Problem s;
    prepare(s, op, hidden, targets, tables, projections, token_band, token_row, weight, ignore_index,
            label_smoothing);
    for (const Tensor* t : {&grad_loss, &grad_lse, &lse})
        STD_TORCH_CHECK(
            t->dim() == 1 && t->size(0) == targets.size(0) && t->scalar_type() == ScalarType::Float, op,
            ": grad_loss, grad_lse and lse must be float32 [N]; got ", shape_of(*t));
    CrossEntropyParams& p = s.p;
    const int64_t element = p.dtype == DType::kFloat32 ? 4 : 2;
    auto zeros_like = [&](const Tensor& t) {
        Tensor grad = torch::stable::new_empty(t, {t.size(0), t.size(1)});
        if (grad.numel()) std::memset(grad.mutable_data_ptr(), 0, grad.numel() * element);
        return grad;
    };
    Tensor grad_hidden = zeros_like(hidden);
    std::vector<Tensor> grad_tables, grad_projections;
    for (size_t b = 0; b < tables.size(); ++b) {
        grad_tables.push_back(zeros_like(tables[b]));
        s.bands[b].grad_table = grad_tables.back().mutable_data_ptr();
        grad_projections.push_back(zeros_like(projections[b]));
        if (s.bands[b].projection) s.bands[b].grad_projection = grad_projections.back().mutable_data_ptr();
    }
    if (p.tokens == 0) return {grad_hidden, grad_tables, grad_projections};
    p.grad_hidden = grad_hidden.mutable_data_ptr();

    const auto* upstream = static_cast<const float*>(s.keep(grad_loss));
    const auto* upstream_lse = static_cast<const float*>(s.keep(grad_lse));
    const auto* saved = static_cast<const float*>(s.keep(lse));
    float *log_sum = s.buffer(s.padded), *softmax = s.buffer(s.padded), *target = s.buffer(s.padded),
          *smooth = s.buffer(s.padded);
    for (int64_t n = 0; n < p.tokens; ++n) {
        const double g = upstream[p.token[n]], per_class = s.smoothing / static_cast<double>(s.classes);
        const double sharp = (1 - s.smoothing) * s.target_weight[n];
        log_sum[n] = saved[p.token[n]];
        softmax[n] = static_cast<float>(g * (sharp + per_class * s.total_weight) + upstream_lse[p.token[n]]);
        target[n] = static_cast<float>(g * sharp);
        smooth[n] = static_cast<float>(g * per_class);
    }
    p.lse = log_sum, p.softmax_scale = softmax, p.target_scale = target, p.smooth_scale = smooth;

    make_tiles(s);
    project(s, true);
    const cpu::CrossEntropyBackwardKernels& k = cpu::variable_width_cross_entropy_backward_kernels();
    // How many tiles of the band have added to each block's grad_projected: they do so in order, whichever
    // thread has them. The first tile drawn never waits, so somebody always works.
    std::vector<std::atomic<int64_t>> added(p.band_count * s.blocks);
    for_each_task(static_cast<int64_t>(s.tiles.size()), k.scratch_bytes(p), s.parallel,
                  [&](int64_t i, char* scratch) {
                      const ClassTile tile = s.tiles[i];
                      k.begin(p, tile, scratch);
                      for (int64_t block = 0; block < s.blocks; ++block) {
                          k.scores(p, tile, block, scratch);
                          std::atomic<int64_t>& turn = added[tile.band * s.blocks + block];
                          while (turn.load(std::memory_order_acquire) != tile.begin)
                              std::this_thread::yield();
                          k.hidden(p, tile, block, scratch);
                          turn.store(tile.end, std::memory_order_release);
                      }
                      k.end(p, tile, scratch);
                  });
    const int64_t slices = blocks(p.embedding_dim, kTokenBlock);
    for_each_task(s.blocks + slices * p.band_count, k.unproject_scratch_bytes(p), s.parallel,
                  [&](int64_t i, char* scratch) {
                      if (i < s.blocks) return k.grad_hidden(p, i, scratch);
                      const int64_t band = (i - s.blocks) / slices, slice = (i - s.blocks) % slices;
                      if (s.bands[band].grad_projection == nullptr) return;
                      k.grad_projection(p, band, slice * kTokenBlock,
                                        std::min(p.embedding_dim, (slice + 1) * kTokenBlock), scratch);
                  });
    return {grad_hidden, grad_tables, grad_projections};
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
    m.def(
        "variable_width_cross_entropy.cpu(Tensor hidden, Tensor targets, Tensor[] tables, Tensor[] "
        "projections, "
        "Tensor token_band, Tensor token_row, Tensor? weight, int ignore_index, float label_smoothing) "
        "-> (Tensor loss, Tensor lse)");
    m.def(
        "variable_width_cross_entropy_backward.cpu(Tensor grad_loss, Tensor grad_lse, Tensor hidden, "
        "Tensor targets, Tensor[] tables, Tensor[] projections, Tensor token_band, Tensor token_row, "
        "Tensor? weight, Tensor lse, int ignore_index, float label_smoothing) "
        "-> (Tensor grad_hidden, Tensor[] grad_tables, Tensor[] grad_projections)");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
    m.impl("variable_width_cross_entropy.cpu", TORCH_BOX(&sparse_attn::variable_width_cross_entropy_cpu));
    m.impl("variable_width_cross_entropy_backward.cpu",
           TORCH_BOX(&sparse_attn::variable_width_cross_entropy_backward_cpu));
}
