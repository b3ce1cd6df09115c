#!/usr/bin/env bash
# What a machine with an NVIDIA GPU should measure: benchmarks/gpu.sh [PART]      docs/benchmarks.md
#
# Needs python with torch; builds the extension into a folder of its own, installs nothing, and asks
# the network for nothing. Results and logs go to ${OUT:-benchmarks/results}. A step that fails does
# not stop the later ones; the exit status says whether all went well. Without a GPU the same flow
# runs on the CPU at small sizes, so that it can be tried and tested.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
BUILD=${BUILD:-build/gpu}
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/$BUILD/lib${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
SUMMARY=()
STATUS=0

# step NAME SECONDS COMMAND...   run with a time limit; the end of its output, and a line of summary
step() {
    local name=$1 limit=$2 log="$OUT/$part.$1.log" begin=$SECONDS result=passed
    shift 2
    echo "== $name: $*"
    timeout --kill-after=10 "$limit" "$@" >"$log" 2>&1
    local code=$?
    tail -n "${LINES_SHOWN:-12}" "$log"
    if [ "$code" = 124 ] || [ "$code" = 137 ]; then result="STOPPED after $limit s"
    elif [ "$code" != 0 ]; then result="FAILED with $code"; fi
    [ "$code" = 0 ] || STATUS=1
    SUMMARY+=("$(printf '%-11s %4d s  %s' "$name" $((SECONDS - begin)) "$result")")
}

# skip NAME REASON   the line of a step that cannot run here
skip() { SUMMARY+=("$(printf '%-11s    -    skipped: %s' "$1" "$2")"); }

# summary   one line per step, last of all
summary() {
    echo "== $part: steps"
    printf '%s\n' "${SUMMARY[@]}"
}

has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

# build_extension   fastrl_kernels._C for this GPU alone
build_extension() {
    if [ "$DEVICE" = cpu ]; then skip build "no GPU"; return; fi
    if ! command -v nvcc >/dev/null; then skip build "no nvcc"; return; fi
    LINES_SHOWN=3 step build 75 env FASTRL_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST="$ARCHITECTURE" \
        "$PYTHON" setup.py -q build_ext --build-lib "$BUILD/lib" --build-temp "$BUILD/temp"
}

# Six minutes in all: 75 + 100 + 45 + 130 s, and a few for what stands between the steps.
part_kernels() {
    build_extension
    if [ "$DEVICE" = cpu ]; then
        skip tests "no GPU"
        skip memcheck "no GPU"
    else
        local many=()
        if has xdist; then many=(-n 8); fi
        LINES_SHOWN=30 step tests 100 "$PYTHON" -m pytest -m gpu -q "${many[@]}" \
            -p no:cacheprovider tests/kernels tests/ops
        if ! command -v compute-sanitizer >/dev/null; then
            skip memcheck "no compute-sanitizer"
        else  # without torch's own pools, so that each tensor has an end
            local files=(kernels/fastrl_kernels/cuda/[a-z]*.py) ops=(norm)
            local file
            for file in "${files[@]}"; do ops+=("$(basename "$file" .py)"); done
            step memcheck 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
                compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" -m benchmarks \
                kernels --device cuda --small --check_only --providers cuda triton \
                --ops "${ops[@]}" --topic memcheck --out "$OUT"
        fi
    fi
    local small=()
    if [ "$DEVICE" = cpu ]; then small=(--small); fi
    LINES_SHOWN=80 step benchmarks 130 "$PYTHON" -m benchmarks kernels --device "$DEVICE" \
        "${small[@]}" --budget 110 --out "$OUT"
}

# Tests of folder $2 that need a GPU, then the benchmarks of part $1. Six minutes in all: 75 + 60 +
# 220 s, and a few for what stands between the steps.
tests_and_benchmarks() {
    build_extension
    local small=()
    if [ "$DEVICE" = cpu ]; then
        skip tests "no GPU"
        small=(--small)
    else
        LINES_SHOWN=30 step tests 60 "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider "$2"
    fi
    LINES_SHOWN=80 step benchmarks 220 "$PYTHON" -m benchmarks "$1" --device "$DEVICE" \
        "${small[@]}" --budget 180 --out "$OUT"
}

part_engine() { tests_and_benchmarks engine tests/engine; }

part_exact() { tests_and_benchmarks exact tests/exactness; }

# Six minutes in all: 75 + 275 s, and a few for what stands between the steps.
part_big() {
    build_extension
    local small=()
    if [ "$DEVICE" = cpu ]; then small=(--small); fi
    LINES_SHOWN=20 step benchmarks 275 env PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
        "$PYTHON" -m benchmarks big --device "$DEVICE" "${small[@]}" --out "$OUT"
}

# Six minutes in all: 75 + 275 s, and a few for what stands between the steps.
part_ppo() {
    build_extension
    local workload=()
    if [ "$DEVICE" = cpu ]; then workload=(--workload benchmarks/workloads/ppo_tiny.yaml); fi
    LINES_SHOWN=20 step benchmarks 275 "$PYTHON" -m benchmarks.bench_ppo --device "$DEVICE" \
        "${workload[@]}" --budget 255 --out "$OUT"
}

part=${1:-kernels}
known=$(declare -F | sed -n 's/^declare -f part_//p' | paste -sd' ')
if ! declare -F "part_$part" >/dev/null; then
    echo "unknown part '$part'; known: $known" >&2
    exit 2
fi
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
mapfile -t MACHINE < <("$PYTHON" -m benchmarks.machine)
echo "${MACHINE[0]:-$PYTHON does not run}"
read -r DEVICE ARCHITECTURE <<<"${MACHINE[1]:-}"
[ -n "$DEVICE" ] || exit 1
"part_$part"
summary
exit $STATUS
