#!/usr/bin/env bash
# Runs every CUDA kernel of csrc/cuda under compute-sanitizer (memcheck, then racecheck) by way of the tuning program's
# correctness sweep, without timing. Needs an NVIDIA GPU, nvcc and compute-sanitizer. TUNE names a program built before.
set -euo pipefail
cd "$(dirname "$0")/.."
tune=${TUNE:-}
if [ -z "$tune" ]; then
  tune=$(mktemp -d)/tune
  nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o "$tune" bench/cuda_tuning/tune.cu
fi
for tool in memcheck racecheck; do
  echo "== $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 3 "$tune" --no-time "$@"
done
