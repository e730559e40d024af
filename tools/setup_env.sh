#!/usr/bin/env bash
# Creates the virtual environment, puts a fitting torch in it, and installs sparse_attn there.
#
#   tools/setup_env.sh cli      editable install with that extra (cli, test, bench, dev)
#   tools/setup_env.sh --torch  only the environment and torch
#
# VENV        where (default .venv)           PYTHON  which interpreter creates it (default python3)
# TORCH_SPEC  which torch, as pip takes it    (default: the one already there; else CUDA's where an NVIDIA GPU
#             answers, and the much smaller CPU build where none does)
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}
CPU_TORCH=2.13.0
what=${1:-cli}
py=$VENV/bin/python
log=$(mktemp)
progress=$(mktemp)
follower=""
trap 'rm -f "$log" "$progress"; [[ -z $follower ]] || kill "$follower"' EXIT

say() { echo "setup: $*"; }

try() { # runs a command quietly; its output is kept for `die`
    "$@" >"$log" 2>&1
}

show_progress() { # follows the file to which the build writes what it has compiled
    local shown="" now="" waited=0
    while sleep 1; do
        waited=$((waited + 1))
        now=$(tail -n 1 "$progress")
        [[ $now != "$shown" ]] || continue
        if [[ -t 1 ]]; then
            printf '\r\033[Ksetup: %s' "${now:0:100}"
            shown=$now
        elif ((waited >= 15)); then # a log wants fewer lines
            say "$now"
            shown=$now waited=0
        fi
    done
}

follow() { # `try`, showing how far the compiler is: pip hides what a build says
    local status=0
    show_progress &
    follower=$!
    SPARSE_ATTN_PROGRESS=$progress try "$@" || status=$?
    kill "$follower"
    wait "$follower" 2>/dev/null || true
    follower=""
    [[ ! -t 1 || ! -s $progress ]] || printf '\r\033[K'
    return "$status"
}

die() {
    tail -n 30 "$log" >&2
    echo "setup: $*" >&2
    exit 1
}

pip_install() { "$py" -m pip install --quiet --disable-pip-version-check "$@"; }

torch_is_there() {
    "$py" - <<'EOF' >/dev/null 2>&1
import re
from importlib.metadata import version

raise SystemExit(tuple(int(n) for n in re.findall(r"\d+", version("torch"))[:2]) < (2, 10))
EOF
}

install_torch() {
    if [[ -n ${TORCH_SPEC:-} ]]; then
        say "installing $TORCH_SPEC (TORCH_SPEC)"
        try pip_install "$TORCH_SPEC" numpy || die "pip could not install TORCH_SPEC=$TORCH_SPEC"
    elif torch_is_there; then
        return
    elif [[ $(uname) == Darwin ]] || { command -v nvidia-smi && nvidia-smi; } >/dev/null 2>&1; then
        say "installing torch"
        try pip_install "torch>=2.10" numpy || die "pip could not install torch>=2.10"
    else
        # The plain name brings gigabytes of CUDA libraries on Linux, so the CPU build is tried by each of its names.
        say "installing torch for the CPU (no NVIDIA GPU answers; TORCH_SPEC overrides)"
        try pip_install "torch==$CPU_TORCH+cpu" numpy && return
        try pip_install uv && try "$VENV/bin/uv" pip install --quiet --python "$py" --torch-backend cpu \
            "torch==$CPU_TORCH" numpy && return
        say "no CPU build was found: installing the default torch, which is large"
        try pip_install "torch==$CPU_TORCH" numpy || die "pip could not install torch"
    fi
}

if [[ ! -x $py ]]; then
    "$PYTHON" -c 'import sys; raise SystemExit(sys.version_info < (3, 10))' 2>/dev/null ||
        die "$PYTHON is missing or older than Python 3.10; set PYTHON to a newer one"
    say "creating $VENV"
    try "$PYTHON" -m venv "$VENV" || die "$PYTHON -m venv failed (on Debian and Ubuntu: apt install python3-venv)"
fi
install_torch
[[ $what == --torch ]] && exit

say "installing sparse_attn[$what]; the first build of the kernels takes a few minutes"
follow pip_install --editable ".[$what]" || die "pip could not install sparse_attn; its last words are above"
if [[ -f sparse_attn/_no_extension.txt ]]; then
    say "without the native kernels: $(head -n 1 sparse_attn/_no_extension.txt)"
fi
