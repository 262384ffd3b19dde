#!/usr/bin/env bash
# Runs every CUDA kernel of csrc/cuda under compute-sanitizer (memcheck on every case of the tuning program's correctness
# sweep, racecheck, which is far slower, on every 7th; both on every variant of the quantising passes), without timing.
# Needs an NVIDIA GPU, nvcc and compute-sanitizer. TUNE and TUNE_QUANTIZE name programs built before.
set -euo pipefail
cd "$(dirname "$0")/.."
built=$(mktemp -d)
tune=${TUNE:-$built/tune}
tune_quantize=${TUNE_QUANTIZE:-$built/tune_quantize}
for program in "$tune" "$tune_quantize"; do
  name=$(basename "$program")
  [ -e "$program" ] || nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o "$program" "bench/cuda_tuning/$name.cu"
done
echo "== memcheck"
compute-sanitizer --tool memcheck --error-exitcode 3 "$tune" --no-time "$@"
echo "== racecheck"
compute-sanitizer --tool racecheck --error-exitcode 3 "$tune" --no-time --sweep-every 7 "$@"
for tool in memcheck racecheck; do
  echo "== $tool, quantising passes"
  compute-sanitizer --tool "$tool" --error-exitcode 3 "$tune_quantize" --no-time --tokens 33 \
    --dim 5120,1536,13824,20000,1000,200,77
done
