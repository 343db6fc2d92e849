#!/usr/bin/env bash
# A day on a GPU in one command: benches/gpu_day.sh OUT_DIR [MINUTES [STEP...]]
#
# Builds the extension, runs the op tests on the GPU, compute-sanitizer on the CUDA kernels, one case beyond 2^31 elements
# a kernel, the benches of the table GOALS in gpu_day.py, then whole steps and rollouts. The most valuable comes first. Each step has
# its own limit, cut down in proportion, to a minute at least, where all that are still to come would take longer than what
# is left of MINUTES (120 by default): what a step leaves over goes to the others. Its log is OUT_DIR/NN-name.log, each
# figure is in OUT_DIR/rows.jsonl when it is known, and OUT_DIR/summary.md is made anew after each step: so it can be
# stopped at any minute. A step that fails, or whose tools are missing, does not stop the others. OUT_DIR with the figures
# of another day in it is refused: they are too dear to be written over. STEPs, by their names below, are run alone, in
# the order given: a day can be had in several parts, each with its own OUT_DIR.
#
# Needs an NVIDIA GPU, Python with torch and pytest; nvcc for the CUDA kernels; no network. What else is installed is used.
# PYTHON names the interpreter. ALIGNFAST_WHEELS names a folder of wheels to install from, without the network.
# ALIGNFAST_GPU_DAY_STEPS names a file of steps (name|seconds|command) to run in place of these; then no GPU is asked for.
set -uo pipefail

if [ $# -lt 1 ] || ! [[ "${2:-120}" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: benches/gpu_day.sh OUT_DIR [MINUTES [STEP...]]" >&2
  exit 2
fi
mkdir -p "$1" || exit 1
OUT=$(cd "$1" && pwd)
if [ -e "$OUT/steps.tsv" ] || [ -e "$OUT/rows.jsonl" ]; then
  echo "gpu_day: $OUT holds the figures of another day; name another folder, or remove that one" >&2
  exit 1
fi
MINUTES=${2:-120}
WANTED=("${@:3}")
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
# paths are of where this was called; an interpreter's link is kept, since it tells a virtual environment from its base
case $PYTHON in */*) PYTHON=$(realpath --no-symlinks "$PYTHON") ;; esac
if [ -n "${ALIGNFAST_WHEELS:-}" ]; then ALIGNFAST_WHEELS=$(cd "$ALIGNFAST_WHEELS" && pwd) || exit 1; fi
if [ -n "${ALIGNFAST_GPU_DAY_STEPS:-}" ]; then ALIGNFAST_GPU_DAY_STEPS=$(realpath "$ALIGNFAST_GPU_DAY_STEPS"); fi
if [ -d /usr/local/cuda/bin ]; then PATH="$PATH:/usr/local/cuda/bin"; fi
cd "$ROOT" || exit 1
export OUT ROOT PYTHON
export ALIGNFAST_BENCH_ROWS="$OUT/rows.jsonl"
export PYTHONUNBUFFERED=1

# name|limit in seconds|command, in this order
steps() {
  if [ -n "${ALIGNFAST_GPU_DAY_STEPS:-}" ]; then
    cat "$ALIGNFAST_GPU_DAY_STEPS"
    return
  fi
  local bench="$PYTHON -m pytest -q -rN --tb=short -p at_once -p no:cacheprovider -c /dev/null --rootdir=$ROOT/benches --import-mode=importlib \
-o pythonpath=$ROOT/benches -o python_files=bench_*.py -o python_functions=bench_*"
  local tests="$PYTHON -m pytest -q --tb=short -p at_once -p no:cacheprovider -c $ROOT/pyproject.toml --rootdir=$ROOT -m 'not slow' -k cuda"
  cat << STEPS
environment|60|nvidia-smi && $PYTHON $ROOT/benches/gpu_cases.py environment
build|900|cd $ROOT && $PYTHON setup.py build_ext --inplace
check-every-kernel|300|$PYTHON $ROOT/benches/gpu_cases.py small
bench-token-logps|420|$bench $ROOT/benches/bench_token_logps.py
bench-linear-loss|420|$bench $ROOT/benches/bench_linear_loss.py
bench-gae|180|$bench $ROOT/benches/bench_gae.py
op-tests|1200|$tests $ROOT/tests/ops
memcheck|420|PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 $PYTHON $ROOT/benches/gpu_cases.py small --backend native
racecheck|420|compute-sanitizer --tool racecheck --error-exitcode 9 $PYTHON $ROOT/benches/gpu_cases.py small --backend native
beyond-2-31|420|$PYTHON $ROOT/benches/gpu_cases.py large
bench-attention|300|$bench $ROOT/benches/bench_packed_attention.py
bench-sampling|240|$bench $ROOT/benches/bench_sample_tokens.py
bench-rollout|600|$bench $ROOT/benches/bench_rollout.py
bench-dpo-step|600|$bench $ROOT/benches/bench_dpo_step.py
bench-grpo-step|600|$bench $ROOT/benches/bench_grpo_step.py
bench-small-ops|300|$bench $ROOT/benches/bench_kl.py $ROOT/benches/bench_policy_loss.py $ROOT/benches/bench_preference_loss.py
bench-growth|900|$bench $ROOT/benches/bench_growth.py
STEPS
}

# alignfast as it lies in the checkout, without an installation: kernels/ops is alignfast.kernels. Linked anew after each
# step: what the build makes is to be found.
link_site() {
  mkdir -p "$OUT/site/alignfast"
  local entry
  for entry in "$ROOT"/alignfast/*; do
    ln -sfn "$entry" "$OUT/site/alignfast/$(basename "$entry")"
  done
  ln -sfn "$ROOT/kernels/ops" "$OUT/site/alignfast/kernels"
}

make_site() {
  link_site
  if [ -n "${ALIGNFAST_WHEELS:-}" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --target "$OUT/site/wheels" "$ALIGNFAST_WHEELS"/*.whl \
      > "$OUT/wheels.log" 2>&1 || echo "the wheels of $ALIGNFAST_WHEELS can't be installed: see $OUT/wheels.log" >&2
  fi
  export PYTHONPATH="$OUT/site:$OUT/site/wheels:$ROOT/benches${PYTHONPATH:+:$PYTHONPATH}"
}

summarise() {
  "$PYTHON" "$ROOT/benches/gpu_day.py" "$OUT" > "$OUT/summary.new" 2> "$OUT/summary.log" &&
    mv "$OUT/summary.new" "$OUT/summary.md"
}

CHILD=
stop() {
  # timeout(1) hands the signal on to the step's whole group
  [ -n "$CHILD" ] && kill -TERM "$CHILD" 2> /dev/null && wait "$CHILD" 2> /dev/null
  printf '%s\t%s\t%s\t%s\n' "${NAME:-none}" stopped "$((SECONDS - BEGAN))" "${LIMIT:-0}" >> "$OUT/steps.tsv"
  summarise
  cat "$OUT/summary.md" 2> /dev/null
  exit 130
}

if [ -z "${ALIGNFAST_GPU_DAY_STEPS:-}" ]; then
  if [[ $(timeout 60 nvidia-smi -L 2> /dev/null) != *GPU* ]]; then
    echo "gpu_day: there is no NVIDIA GPU here (nvidia-smi finds none), and so nothing to measure" >&2
    exit 1
  fi
  # the extension for this card alone: all of them take many times as long to compile
  if [ -z "${ALIGNFAST_CUDA_ARCHS:-}" ]; then
    arch=$(timeout 60 nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '. ')
    if [ "$arch" = 90 ]; then arch=90a; fi
    if [[ $arch =~ ^[0-9]+a?$ ]]; then export ALIGNFAST_CUDA_ARCHS="$arch-real"; fi
  fi
fi
make_site

LIST=()
if [ ${#WANTED[@]} -eq 0 ]; then
  mapfile -t LIST < <(steps | grep .)
fi
for wanted in "${WANTED[@]}"; do
  line=$(steps | grep "^$wanted|")
  if [ -z "$line" ]; then
    echo "gpu_day: there is no step $wanted; they are: $(steps | cut -d'|' -f1 | tr '\n' ' ')" >&2
    exit 2
  fi
  LIST+=("$line")
done
TOTAL=0  # seconds that the steps still to come would take at most
for line in "${LIST[@]}"; do
  IFS='|' read -r _ limit _ <<< "$line"
  TOTAL=$((TOTAL + limit))
done
END=$((SECONDS + MINUTES * 60))
BEGAN=$SECONDS
trap stop INT TERM HUP

NUMBER=0
for line in "${LIST[@]}"; do
  IFS='|' read -r NAME LIMIT command <<< "$line"
  NUMBER=$((NUMBER + 1))
  LEFT=$((END - SECONDS))
  whole=$LIMIT
  if [ "$TOTAL" -gt "$LEFT" ]; then
    LIMIT=$((LIMIT * LEFT / TOTAL))
    [ "$LIMIT" -lt 60 ] && LIMIT=60  # in less a step does little but start
    [ "$LIMIT" -gt "$whole" ] && LIMIT=$whole
  fi
  TOTAL=$((TOTAL - whole))
  [ "$LIMIT" -gt "$LEFT" ] && LIMIT=$LEFT
  BEGAN=$SECONDS
  if [ "$LIMIT" -lt 1 ]; then
    printf '%s\t%s\t%s\t%s\n' "$NAME" "no time left" 0 0 >> "$OUT/steps.tsv"
    continue
  fi
  log=$(printf '%s/%02d-%s.log' "$OUT" "$NUMBER" "$NAME")
  echo "== $NAME (at most $LIMIT s of $LEFT s left)"
  # from the site, whose alignfast has its kernels: Python looks for packages where it is started
  (cd "$OUT/site" && exec timeout --kill-after=10 "$LIMIT" bash -c "$command") > "$log" 2>&1 &
  CHILD=$!
  wait "$CHILD"
  code=$?
  CHILD=
  case $code in
    0) outcome="done" ;;
    124) outcome="over its time" ;;
    137) if [ $((SECONDS - BEGAN)) -ge "$LIMIT" ]; then outcome="over its time"; else outcome="killed"; fi ;;
    127) outcome="a tool is missing" ;;
    *) outcome="failed ($code)" ;;
  esac
  printf '%s\t%s\t%s\t%s\n' "$NAME" "$outcome" "$((SECONDS - BEGAN))" "$LIMIT" >> "$OUT/steps.tsv"
  echo "   $outcome after $((SECONDS - BEGAN)) s"
  link_site
  summarise
done
summarise
cat "$OUT/summary.md"
