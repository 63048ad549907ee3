#!/bin/bash
# A short session on a GPU of a machine where nothing is installed but Python and PyTorch.
#   OUT=FOLDER bash benchmarks/gpu_session.sh smoke
#   OUT=FOLDER bash benchmarks/gpu_session.sh train TABLE… [options of layerwise reproduce]
# smoke runs the tests that need a GPU; no data are read.
# train puts data together if they came in parts (runs/data-aa, runs/data-ab …, pieces of one tar
# archive, which $UNPACK then turns into $DATA), and trains rows of the paper at middle scale.
# Everything that is to be kept lies under $OUT, packed anew every 15 seconds: a session that is
# killed loses little. The archive of earlier runs is unpacked first, so that these are skipped.
set -u
stage=${1:?smoke or train}
shift
: "${OUT:?a folder for results}"
PYTHON=${PYTHON:-python3} DATA=${DATA:-runs/data} RUNS=runs/middle
export PYTHONPATH=src PYTHONUNBUFFERED=1
mkdir -p "$OUT" "$RUNS"

say() { echo "[$SECONDS s] $*" | tee -a "$OUT/steps.txt"; }

keep() {
  find "$RUNS" -name '*.json*' | tar czf "$OUT/now.tgz" -T - 2>/dev/null
  mv -f "$OUT/now.tgz" "$OUT/middle.tgz"
}

smoke() {
  nvidia-smi -L | tee "$OUT/machine.txt"
  git log -1 --format=%h 2>/dev/null | tee -a "$OUT/machine.txt"
  "$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.is_available())' \
    2>&1 | tee -a "$OUT/machine.txt"
  timeout 120 "$PYTHON" -m pytest -q -n 8 -p no:cacheprovider \
    tests/test_cuda_graphs.py tests/test_units.py 2>&1 | tee "$OUT/tests.txt" | tail -30
  say "tests done"
}

train() {
  if ls runs/data-* >/dev/null 2>&1; then
    cat runs/data-* | tar xf - -C runs || { say "data incomplete"; exit 1; }
    ${UNPACK:-true} || { say "data not unpacked"; exit 1; }
  fi
  tar xzf results/middle-scale-runs.tar.gz -C "$RUNS"
  say "data ready"
  (while sleep 15; do keep; done) &
  local keeper=$!
  "$PYTHON" -m layerwise reproduce "$@" --scale middle --output "$RUNS" --data-dir "$DATA" \
    --streams 4 --eval-every 5 --save-every 1000 --separability-every 10 \
    --separability-measures linear_probe 2>&1 | tee "$OUT/train.txt" | grep -vE '^epoch'
  local code=${PIPESTATUS[0]}
  kill "$keeper"
  keep
  say "trained, exit code $code"
  exit "$code"
}

case $stage in
  smoke) smoke ;;
  train) train "$@" ;;
  *) echo "Cannot run $stage: it is no stage. Give smoke or train." >&2; exit 2 ;;
esac
