#!/usr/bin/env bash
# All that a GPU can tell in under nine minutes: bash bench/gpu_check.sh [--dry-run] [FOLDER]   (default: bench/results/)
# Sections are independent, each with its own limit; what fails or is skipped says why. --dry-run: toy sizes on the CPU.
# PYTHON names the interpreter. WHEELS names a folder of wheels for packages that it lacks (see docs/gpu.md).
set -u
cd "$(dirname "$0")/.."

DRY=()
if [ "${1:-}" = "--dry-run" ]; then DRY=(--dry-run); shift; fi
OUT=${1:-bench/results}
mkdir -p "$OUT" || exit 1
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
LOG=$OUT/gpu_check.log
END=$((SECONDS + ${LIMIT_S:-520}))
rm -f "$OUT"/gpu_*.json "$OUT"/gpu_check.txt
: > "$LOG"

if ! "$PYTHON" -c 'import msgspec' 2>/dev/null && [ -d "${WHEELS:-build/wheels}" ]; then
  SITE=$(mktemp -d)
  "$PYTHON" -m pip install --no-index --no-deps --quiet --target "$SITE" "${WHEELS:-build/wheels}"/*.whl >>"$LOG" 2>&1
  export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
fi
{ date -u +%FT%TZ; git rev-parse HEAD 2>/dev/null; nvidia-smi -L 2>/dev/null; } | tee "$OUT/gpu_machine.txt" | tee -a "$LOG"

section() { # section LIMIT NAME [arguments]
  local limit=$1 left=$((END - SECONDS)); shift
  [ "$left" -lt 10 ] && { echo "== $*: left out, no time" | tee -a "$LOG"; return; }
  [ "$left" -lt "$limit" ] && limit=$left
  echo "== $*" | tee -a "$LOG"
  timeout --kill-after=5 "$limit" "$PYTHON" -m bench.gpu "$@" --limit "$limit" --out "$OUT" ${DRY[@]+"${DRY[@]}"} >>"$LOG" 2>&1
  local code=$?
  [ "$code" -eq 0 ] || echo "== $*: exit status $code after at most $limit s" | tee -a "$LOG"
}

section 40 environment
section 30 ceilings
section 45 tokens
if [ ${#DRY[@]} -gt 0 ]; then export TRITON_INTERPRET=1; fi
section 60 kernels
unset TRITON_INTERPRET
section 75 gate
section 40 vmm
section 60 models --only llama-3.1-8b
section 190 colocation
section 40 models --only qwen3-0.6b
section 60 models --only qwen3-8b
section 60 throughput

"$PYTHON" -m bench.gpu report --out "$OUT"
