#!/usr/bin/env bash
# One command on a machine with a GPU: builds with what is installed there, tests and measures on the device.
#
#   benchmarks/gpu_check.sh [build|test|bench|sanitize|all] [--out DIR] [--limit SECONDS] [--dry-run]
#
#   build   the extension, for this GPU's architecture alone, in place
#   test    the test suite on the device, several files at once: first what runs on the GPU, then the rest
#   bench   the benchmarks (python -m benchmarks.gpu): one JSON and one PNG named after the device
#   sanitize  compute-sanitizer over the CUDA kernels: memcheck, racecheck, initcheck
#   all     all of them (the default); each step runs whatever became of the one before
#
# Needs no network: torch 2.10 or later and Triton must be there; pytest for the tests; nvcc for CUDA kernels. What else is
# missing is left out and named. Files go to --out, else to $OUT, else to benchmarks/results. Each step ends within
# --limit (default 540 s). --dry-run needs no GPU: it builds nothing, runs one test file and measures nothing.
set -uo pipefail
cd "$(dirname "$0")/.."

steps=all out=${OUT:-benchmarks/results} limit=540 dry=
while (($#)); do
    case $1 in
        build | test | bench | sanitize | all) steps=$1 ;;
        --out) out=$2 && shift ;;
        --limit) limit=$2 && shift ;;
        --dry-run) dry=--dry-run ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;;
        *) echo "gpu_check.sh: unknown argument $1 (see --help)" >&2 && exit 2 ;;
    esac
    shift
done
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MPLBACKEND=Agg OMP_WAIT_POLICY=passive
mkdir -p "$out"
out=$(cd "$out" && pwd)
failed=()

step() { # step NAME COMMAND…
    local name=$1 start=$SECONDS status
    shift
    echo "== $name"
    "$@"
    status=$?
    ((status == 0)) || failed+=("$name")
    echo "== $name: $( ((status == 0)) && echo ok || echo "FAILED ($status)"), $((SECONDS - start)) s"
}

facts() {
    "$python" - <<'EOF'
import importlib.util, platform, torch
print("python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda, "HIP", torch.version.hip)
for name in ("triton", "pytest", "hypothesis", "expecttest", "pytest_benchmark", "rich", "matplotlib", "ninja", "pybind11"):
    print(f"  {name}: {'there' if importlib.util.find_spec(name) else 'not installed'}")
if torch.cuda.is_available():
    print(" ", torch.cuda.get_device_name(), "capability", torch.cuda.get_device_capability())
else:
    print("  no GPU answers")
EOF
}

build() {
    # 90 and 100 have instructions of their own, which only code for 90a and 100a may use.
    local arch
    arch=$("$python" -c "
import torch
if torch.cuda.is_available() and not torch.version.hip:
    major, minor = torch.cuda.get_device_capability()
    print(f'{major}{minor}' + ('a' if major in (9, 10) else ''))")
    echo "architecture: ${arch:-none (no NVIDIA GPU)}"
    [[ -z $arch ]] || export SPARSE_ATTN_CUDA_ARCHS=$arch
    # egg_info: the metadata that an installed package has, for the tests that read it.
    timeout "$limit" "$python" setup.py -q egg_info build_ext --inplace || return
    "$python" -m sparse_attn doctor
}

tests() {
    local half=$((limit / 2)) status=0
    if [[ -n $dry ]]; then
        "$python" -m benchmarks.gpu.tests --limit "$limit" --out "$out/tests_dry_run.json" tests/test_checks.py
        return
    fi
    # The ids of what runs on the device end in its name: cuda-cuda, triton-cuda.
    "$python" -m benchmarks.gpu.tests --limit "$half" -k "cuda and not simulated" --out "$out/tests_gpu.json" || status=1
    "$python" -m benchmarks.gpu.tests --limit "$half" -k "not cuda or simulated" --out "$out/tests_rest.json" || status=1
    return $status
}

bench() {
    timeout "$((limit + 30))" "$python" -m benchmarks.gpu --out "$out" --limit "$limit" $dry
}

# A few tests of each kernel: under the sanitizer everything takes some hundred times as long.
sanitize() {
    local status=0 tool
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not here (CUDA toolkit): left out"
        return 0
    fi
    for tool in memcheck racecheck initcheck; do
        echo "-- $tool"
        timeout "$((limit / 3))" compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
            "$python" -m pytest -q -p no:cacheprovider -k "cuda-cuda and (groups or three or lengths or padding)" \
            tests/ops/test_gathered_attention.py tests/ops/test_topk_select.py tests/ops/test_variable_width_embedding.py \
            >"$out/sanitizer_$tool.log" 2>&1 || status=1
        tail -n 5 "$out/sanitizer_$tool.log"
    done
    return $status
}

facts
if [[ $steps == build || $steps == all ]] && [[ -z $dry ]]; then step build build; fi
if [[ $steps == test || $steps == all ]]; then step tests tests; fi
if [[ $steps == sanitize || $steps == all ]] && [[ -z $dry ]]; then step sanitize sanitize; fi
if [[ $steps == bench || $steps == all ]]; then step benchmarks bench; fi
((${#failed[@]} == 0)) || printf 'failed step: %s\n' "${failed[@]}"
((${#failed[@]} == 0))
