#!/usr/bin/env bash
# Two commands on a machine with a GPU, each within ten minutes: build and measure, then test on the device.
#
#   benchmarks/gpu_check.sh [build-and-bench|test|build|bench|sanitize] [--out DIR] [--limit SECONDS] [--dry-run]
#
#   build-and-bench  both of the next two
#     build    the extension, for this GPU's architecture alone, in place
#     bench    the benchmarks (python -m benchmarks.gpu): one JSON and one PNG named after the device
#   test       the tests on the device, several files at once: what runs on the GPU, in order of risk, then
#     sanitize compute-sanitizer over the CUDA kernels: memcheck, racecheck, initcheck
#
# Needs no network: torch 2.10 or later and Triton must be there; pytest for the tests; nvcc for CUDA kernels. What else is
# missing is left out and named. Files go to --out, else to $OUT, else to benchmarks/results; each row is written as it
# is measured. A command ends within --limit (default 580 s), and each step runs whatever became of the one before.
# --dry-run needs no GPU: it builds nothing, runs one test file and measures nothing.
set -uo pipefail
cd "$(dirname "$0")/.."

steps= out=${OUT:-benchmarks/results} limit=580 dry=
while (($#)); do
    case $1 in
        build-and-bench | build | bench | test | sanitize) steps=$1 ;;
        --out) out=$2 && shift ;;
        --limit) limit=$2 && shift ;;
        --dry-run) dry=--dry-run ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;;
        *) echo "gpu_check.sh: unknown argument $1 (see --help)" >&2 && exit 2 ;;
    esac
    shift
done
[[ -n $steps ]] || { echo "gpu_check.sh: which command? build-and-bench, then test (see --help)" >&2 && exit 2; }
python=${PYTHON:-python3}
left() { echo $((limit > SECONDS + 10 ? limit - SECONDS : 10)); } # seconds, of the whole command
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
    timeout "$(left)" "$python" setup.py -q egg_info build_ext --inplace || return
    "$python" -m sparse_attn doctor
}

tests() {
    if [[ -n $dry ]]; then
        "$python" -m benchmarks.gpu.tests --limit "$(left)" --out "$out/tests_dry_run.json" tests/test_checks.py
        return
    fi
    # The ids of what runs on the device end in its name: cuda-cuda, triton-cuda.
    # Those of the CPU run anywhere; the sanitizer gets the last quarter of the time.
    "$python" -m benchmarks.gpu.tests --limit "$((limit * 3 / 4))" -k "cuda and not simulated" --out "$out/tests_gpu.json"
}

bench() {
    timeout "$(left)" "$python" -m benchmarks.gpu --out "$out" --limit "$(($(left) - 20))" $dry
}

# A few tests of each kernel: under the sanitizer everything takes some hundred times as long. Without torch's cache of
# memory, in whose blocks an overrun would go unseen.
sanitize() {
    local status=0 tool tools=3
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not here (CUDA toolkit): left out"
        return 0
    fi
    for tool in memcheck racecheck initcheck; do
        echo "-- $tool"
        timeout "$(($(left) / tools))" compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
            "$python" -m pytest -q -p no:cacheprovider -k "cuda-cuda and (groups or three or lengths or padding)" \
            tests/ops/test_gathered_attention.py tests/ops/test_topk_select.py tests/ops/test_variable_width_embedding.py \
            >"$out/sanitizer_$tool.log" 2>&1 || status=1
        tail -n 5 "$out/sanitizer_$tool.log"
        tools=$((tools - 1))
    done
    return $status
}

facts
if [[ $steps == *build* && -z $dry ]]; then step build build; fi
if [[ $steps == *bench ]]; then step benchmarks bench; fi
if [[ $steps == test ]]; then step tests tests; fi
if [[ $steps == test || $steps == sanitize ]] && [[ -z $dry ]]; then step sanitize sanitize; fi
((${#failed[@]} == 0)) || printf 'failed step: %s\n' "${failed[@]}"
((${#failed[@]} == 0))
