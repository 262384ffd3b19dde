"""A rank of a session that two share; saves its frames: torchrun ... rank_program.py FOLDER OUT"""

from __future__ import annotations

import os
import sys

import torch

from lingbot_kernels.parallel import launch
from lingbot_kernels.pipeline import LingBotWorldPipeline

with launch.process_group("cpu") as group:
    torch.set_num_threads(1)
    pipeline = LingBotWorldPipeline.from_pretrained(sys.argv[1], device="cpu")
    pipeline.transformer.shard_sequence(group)
    try:
        pipeline.session("a harbour at dawn", height=32, width=48)
    except ValueError as error:
        assert "seed: got None" in str(error)
    else:
        raise AssertionError("a session without a seed was accepted")
    with pipeline.session("a harbour at dawn", height=32, width=176, seed=3) as session:
        frames = torch.cat([session.step(keys) for keys in ("w", "w+l", "")])
    torch.save(frames, f"{sys.argv[2]}.{os.environ['RANK']}")
