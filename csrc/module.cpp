// sparse_attn._C, the Python module: what Python asks of the library beside its ops, which the library
// registers with torch itself (at the end of each csrc/cpu/<op>.cpp and csrc/cuda/<op>.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "build_config.h"  // written by the build
#include "cpu/bounds.h"
#include "cpu/isa.h"
#include "cpu/tile_costs.h"
#include "cpu/token_counts.h"

namespace {

namespace py = pybind11;

std::vector<std::string> split(const char* list) {
    std::vector<std::string> items;
    std::istringstream stream(list);
    for (std::string item; std::getline(stream, item, ',');) items.push_back(item);
    return items;
}

std::string compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#else
    return "gcc " __VERSION__;
#endif
}

py::dict build_info() {
    const std::string cuda = SPARSE_ATTN_BUILD_CUDA;
    const auto target = static_cast<unsigned long long>(TORCH_TARGET_VERSION);
    py::dict info;
    info["compiler"] = compiler();
    info["torch_headers"] = TORCH_VERSION;  // built with these, for any torch from the next line's on
    info["torch_target"] = std::to_string(target >> 56) + "." + std::to_string((target >> 48) & 0xff);
    info["isas"] = split(SPARSE_ATTN_BUILD_ISAS);
    info["cuda"] = cuda.empty() ? py::object(py::none()) : py::object(py::str(cuda));
    info["no_cuda"] = SPARSE_ATTN_BUILD_NO_CUDA;  // why "cuda" is None, else ""
    info["cuda_archs"] = split(SPARSE_ATTN_BUILD_CUDA_ARCHS);
    return info;
}

// tokens: a buffer of uint16 or uint32 [N]; counts: a writable one of int64 [V], or None for the largest id.
int64_t read_tokens(const py::buffer& tokens, const std::optional<py::buffer>& counts) {
    const py::buffer_info ids = tokens.request();
    const bool narrow = ids.item_type_is_equivalent_to<uint16_t>();
    if (!narrow && !ids.item_type_is_equivalent_to<uint32_t>())
        throw py::type_error("tokens must be uint16 or uint32");
    if (ids.ndim != 1 || ids.size >= (py::ssize_t{1} << 32) ||
        (ids.size > 1 && ids.strides[0] != ids.itemsize))
        throw py::value_error("tokens must be one contiguous row of less than 2^32 ids");
    auto with = [&](auto&& read) {
        py::gil_scoped_release others_run;
        return narrow ? read(static_cast<const uint16_t*>(ids.ptr))
                      : read(static_cast<const uint32_t*>(ids.ptr));
    };
    if (!counts) return with([&](auto* t) { return sparse_attn::largest_token(t, ids.size); });
    const py::buffer_info out = counts->request(/*writable=*/true);
    if (!out.item_type_is_equivalent_to<int64_t>() || out.ndim != 1 || out.size < 1 || out.size > (1 << 28) ||
        (out.size > 1 && out.strides[0] != out.itemsize))
        throw py::value_error("counts must be a contiguous row of int64");
    auto* into = static_cast<int64_t*>(out.ptr);
    return with([&](auto* t) { return sparse_attn::count_tokens(t, ids.size, out.size, into); });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of sparse_attn; importing it registers them with torch.";
    m.def("cpu_isa", &sparse_attn::cpu::isa_name, "The instruction set that the CPU kernels run on here.");
    m.def(
        "count_tokens", [](const py::buffer& t, const py::buffer& c) { return read_tokens(t, c); },
        "Adds the occurrences of each id to counts; returns the position of the first id beyond them, or "
        "-1.");
    m.def(
        "largest_token", [](const py::buffer& t) { return read_tokens(t, std::nullopt); },
        "The largest id, or -1.");
    m.def(
        "use_bounds",
        [](std::optional<bool> use, int bits) {
            using sparse_attn::ByBounds;
            sparse_attn::use_bounds(!use   ? ByBounds::kAuto
                                    : *use ? ByBounds::kAlways
                                           : ByBounds::kNever,
                                    bits);
        },
        py::arg("use"), py::arg("bits") = 0,
        "Exact selection by bounds of rounded scores: wherever it can be done (True), never (False), where "
        "it is faster (None); rounded to 8, 9 or 16 bits, or (0) what is faster. The selection is the same.");
    m.def(
        "bounds_counts",
        [] {
            const sparse_attn::BoundsCounts n = sparse_attn::bounds_counts();
            py::dict counts;
            counts["blocks"] = n.blocks;
            counts["given_up"] = n.given_up;
            counts["rows"] = n.rows;
            counts["budget"] = n.budget;
            counts["kept"] = n.kept;
            counts["scored"] = n.scored;
            return counts;
        },
        "What selection by bounds did since the process began.");
    m.def(
        "use_tiles",
        [](std::optional<bool> use) {
            using sparse_attn::Ways;
            sparse_attn::use_tiles(!use ? Ways::kAuto : *use ? Ways::kTiles : Ways::kGather);
        },
        "Attention by dense tiles: wherever it can be done (True), never (False), where it is faster "
        "(None).");
    m.def(
        "tile_costs",
        [] {
            const sparse_attn::TileCosts c = sparse_attn::tile_costs();
            py::dict costs;
            costs["gather"] = c.gather;
            costs["candidate"] = c.candidate;
            costs["tile_key"] = c.tile_key;
            costs["tile"] = c.tile;
            costs["gather_backward"] = c.gather_backward;
            costs["tile_key_backward"] = c.tile_key_backward;
            costs["tile_backward"] = c.tile_backward;
            return costs;
        },
        "What tiles and gathering cost, in nanoseconds of one thread (csrc/cpu/tile_costs.h).");
    m.def(
        "set_tile_costs",
        [](double gather, double candidate, double tile_key, double tile, double gather_backward,
           double tile_key_backward, double tile_backward) {
            sparse_attn::set_tile_costs(
                {gather, candidate, tile_key, tile, gather_backward, tile_key_backward, tile_backward});
        },
        py::arg("gather"), py::arg("candidate"), py::arg("tile_key"), py::arg("tile"),
        py::arg("gather_backward"), py::arg("tile_key_backward"), py::arg("tile_backward"),
        "Changes them for this process.");
    m.def(
        "backward_tiles_pay",
        [](int64_t first, int64_t keys, int64_t top_k, int64_t width) {
            return sparse_attn::backward_tiles_pay(sparse_attn::tile_costs(), first, keys, top_k, width);
        },
        py::arg("first"), py::arg("keys"), py::arg("top_k"), py::arg("width"),
        "Whether the gradient of queries that see from `first` to `keys` keys is cheaper by tiles; width is "
        "D + "
        "Dv.");
    m.def(
        "tiles_pay",
        [](int64_t visible, int64_t top_k, int64_t head_dim, int64_t value_dim) {
            return sparse_attn::tiles_pay(sparse_attn::tile_costs(), visible, top_k, head_dim, value_dim);
        },
        py::arg("visible"), py::arg("top_k"), py::arg("head_dim"), py::arg("value_dim"),
        "Whether topk_attention serves a query that sees so many keys by tiles.");
    m.def("build_info", &build_info, "What this extension was built with and for, as a dict.");
}
