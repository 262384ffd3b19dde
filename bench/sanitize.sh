#!/usr/bin/env bash
# Runs every CUDA kernel of csrc/cuda under compute-sanitizer (memcheck on every case of the tuning program's correctness
# sweep, racecheck, which is far slower, on every 7th), without timing. Needs an NVIDIA GPU, nvcc and compute-sanitizer.
# TUNE names a program built before.
set -euo pipefail
cd "$(dirname "$0")/.."
tune=${TUNE:-}
if [ -z "$tune" ]; then
  tune=$(mktemp -d)/tune
  nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o "$tune" bench/cuda_tuning/tune.cu
fi
echo "== memcheck"
compute-sanitizer --tool memcheck --error-exitcode 3 "$tune" --no-time "$@"
echo "== racecheck"
compute-sanitizer --tool racecheck --error-exitcode 3 "$tune" --no-time --sweep-every 7 "$@"
