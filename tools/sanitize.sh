#!/usr/bin/env bash
# Builds the extension for a sanitizer, in a folder of its own, and runs what shows most under it.
#
#   tools/sanitize.sh address   ASan and UBSan: reads and writes out of bounds, overflows, shifts, null pointers
#   tools/sanitize.sh thread    TSan: accesses of two threads that nothing orders
#   tools/sanitize.sh address COMMAND…   that command alone, such as: python -m fuzz --case 17
#
# VENV     the environment with torch and the tests' extras (default .venv)      CXX  a gcc (default g++)
# SECONDS_FUZZ  how long the fuzzer runs (default 120)
#
# tests/sanitize/*.supp lists what is suppressed, and why. Leaks are not looked for: Python and torch keep much on
# purpose until the process ends, and the soak (make soak) looks for what grows.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
which=${1:?address or thread}
shift
py=$root/${VENV:-.venv}/bin/python
cxx=${CXX:-g++}
seconds=${SECONDS_FUZZ:-120}
place=$root/build/sanitize/$which
log=$(mktemp)
trap 'rm -f "$log"' EXIT

runtime() { # runtime NAME: the path of gcc's library
    local path
    path=$("$cxx" -print-file-name="lib$1.so")
    [[ $path == /* ]] || { echo "sanitize: $cxx has no lib$1.so; set CXX to a gcc that has" >&2; exit 1; }
    echo "$path"
}

echo "== building for the $which sanitizer"
SPARSE_ATTN_SANITIZE=$which SPARSE_ATTN_REQUIRE_EXT=1 CXX=$cxx \
    "$py" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$place" . >"$log" 2>&1 || {
    tail -n 30 "$log" >&2
    exit 1
}

case $which in
address)
    preload="$(runtime asan) $(runtime ubsan)"
    # handle_segv=0: Python's faulthandler says in which call it was.
    export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1:allocator_may_return_null=1
    export UBSAN_OPTIONS=print_stacktrace=1:suppressions=$root/tests/sanitize/undefined.supp
    ;;
thread)
    preload=$(runtime tsan)
    # Python, torch and OpenMP are not built for TSan: what they alone do is not looked at.
    export TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66:suppressions=$root/tests/sanitize/thread.supp
    ;;
*)
    echo "sanitize: address or thread, got $which" >&2
    exit 2
    ;;
esac
# libstdc++ too: a runtime that is loaded before it does not find what it wraps of it.
export LD_PRELOAD="$preload $(runtime stdc++)"
# The package that was just built, not that of the checkout: no folder comes before it.
export PYTHONSAFEPATH=1 PYTHONPATH=$place:$root/tests
export OMP_WAIT_POLICY=passive SPARSE_ATTN_REQUIRE_EXT=1

cd "$root/tests"
if (($#)); then
    "$@"
    exit
fi
failed=()
step() { # step NAME COMMAND…
    local name=$1 start=$SECONDS status=0
    shift
    echo "== $name"
    "$@" || status=$?
    ((status == 0)) || failed+=("$name")
    echo "== $name: $( ((status == 0)) && echo ok || echo "FAILED ($status)"), $((SECONDS - start)) s"
}

"$py" -c "import sparse_attn; assert sparse_attn.__file__.startswith('$place'), sparse_attn.__file__"
if [[ $which == address ]]; then
    step "random calls" "$py" -m fuzz --seed 1 --seconds "$seconds" --jobs 2
    step "hostile calls of torch.ops" "$py" -m fuzz --seed 1 --ops torch.ops --seconds $((seconds / 2)) --jobs 2
    step "tests of the ops" "$py" -m pytest -q --capture=sys -p no:cacheprovider -k "cpu and not compile and not opcheck" \
        ops/test_special_values.py ops/test_layouts.py ops/test_gradients.py ops/test_quantized_select.py \
        ops/test_variable_width_embedding.py ops/test_variable_width_embedding_errors.py
    # Each wing's tests on the CPU wing, and those that are of it alone.
    step "tests of packs, pages, blocks, decoding, tiles and key indices" \
        "$py" -m pytest -q --capture=sys -p no:cacheprovider \
        -k "not compile and not opcheck and not graph and not reference and not triton and not cuda and not process" \
        ops/test_varlen.py ops/test_varlen_blocks.py ops/test_paged.py ops/test_decoding.py ops/test_masked_tiles.py \
        ops/test_key_index.py ops/test_select_by_bounds.py ops/test_replay.py ops/test_tail.py ops/test_paged_index.py
else
    step "random calls for several threads" "$py" -m fuzz --seed 1 --large 1 --seconds "$seconds" --jobs 1
    step "calls from four Python threads" "$py" -m fuzz soak --ignore-memory --seconds "$seconds"
    step "tests of determinism" "$py" -m pytest -q --capture=sys -p no:cacheprovider -k cpu ops/test_determinism.py
    step "tests of threads" "$py" -m pytest -q --capture=sys -p no:cacheprovider -k threads \
        ops/test_masked_tiles.py ops/test_select_by_bounds.py ops/test_key_index.py ops/test_paged.py \
        ops/test_decoding.py ops/test_varlen.py
fi
((${#failed[@]} == 0)) || printf 'failed step: %s\n' "${failed[@]}"
((${#failed[@]} == 0))
