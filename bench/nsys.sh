#!/usr/bin/env bash
# Profile one steady chunk with Nsight Systems and print kernel sums by NVTX range.
# Usage: bench/nsys.sh [OUTPUT] [options of bench/nsys_chunk.py]; OUTPUT (default: out/chunk) gets .nsys-rep and .sqlite.
# Exit codes: 3 where nsys is absent, else nsys's or the program's own.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
output="$root/out/chunk"
if [[ $# -gt 0 && "$1" != -* ]]; then
  output="$1"
  shift
fi

if ! command -v nsys >/dev/null 2>&1; then
  echo "nsys.sh: nsys (NVIDIA Nsight Systems) is not on PATH; install nsight-systems, or look at the same ranges with" \
    "torch.profiler and LINGBOT_KERNELS_NVTX=1" >&2
  exit 3
fi

mkdir -p "$(dirname "$output")"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" nsys profile \
  --capture-range=cudaProfilerApi --capture-range-end=stop \
  --trace=cuda,nvtx --sample=none --cpuctxsw=none \
  --force-overwrite=true --output="$output" \
  "${PYTHON:-python3}" "$root/bench/nsys_chunk.py" "$@"

for report in nvtx_kern_sum nvtx_gpu_proj_sum cuda_gpu_kern_sum; do
  nsys stats --force-export=true --report "$report" --format table "$output.nsys-rep"
done
