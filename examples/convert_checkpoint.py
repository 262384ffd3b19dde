"""Convert a checkpoint folder (official, FastVideo / sglang or diffusers names) to the official names, in any dtype.

Every missing, unexpected or wrongly shaped tensor is named before anything is written.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lingbot_kernels import CausalLingBotTransformer
from lingbot_kernels.models.checkpoint import CheckpointError

DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of safetensors shards")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    options = parser.parse_args()
    if options.target.exists() and any(options.target.iterdir()):
        parser.error(f"{options.target}: is not empty")
    try:
        model = CausalLingBotTransformer.from_pretrained(options.source, dtype=DTYPES[options.dtype])
    except (CheckpointError, OSError) as error:
        raise SystemExit(str(error)) from error
    model.save_pretrained(options.target)
    files = sorted(options.target.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"{model.config.num_parameters():,} parameters, {len(files)} files, {size / 1e6:.1f} MB in {options.target}")


if __name__ == "__main__":
    main()
