"""A rollout of 200 chunks on the GPU takes no more time and no more memory at its end than at its beginning."""

from __future__ import annotations

import statistics

import torch

from lingbot_kernels import CausalDenoisingStage, CausalLingBotTransformer, LingBotConfig, RealtimeCausalDiTState

CHUNKS, PART, FIRST_STEADY = 200, 50, 8  # the window is full from chunk 5 on, graphs are captured in 5 and 6
SIZE = (58, 104)


def test_time_and_memory_stay_flat() -> None:
    """Medians of the chunks' times by events, the first 50 steady ones against the last 50. A growth of more than 2%
    must not only be one of the clocks: next to each chunk stands a product of constant work.
    """
    config = LingBotConfig.preset("tiny", dim=1024, num_heads=8, num_layers=4, ffn_dim=4096)
    model = CausalLingBotTransformer(config, device="cuda", dtype=torch.bfloat16)
    state, generator = RealtimeCausalDiTState(), torch.Generator("cuda").manual_seed(0)
    text = torch.randn(1, config.text_len, config.text_dim, device="cuda")
    rollout = CausalDenoisingStage(model).rollout(
        state, CHUNKS, text=text, latent_size=SIZE, generator=generator,
        camera=lambda _: torch.randn(1, 384, 3, *SIZE, device="cuda", generator=generator),
    )  # fmt: skip
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = torch.empty_like(square)
    events, held, chunk = [], [], None
    for _ in range(CHUNKS):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        chunk = next(rollout)
        marks[1].record()
        for _ in range(2):
            torch.mm(square, square, out=product)
        marks[2].record()
        events.append(marks)
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), state.nbytes()))
    assert chunk is not None and bool(torch.isfinite(chunk).all())
    assert state.graphs.captures == 2 and state.graphs.replays >= 5 * (CHUNKS - FIRST_STEADY)

    early, late = slice(FIRST_STEADY, FIRST_STEADY + PART), slice(-PART, None)
    for name, sizes in zip(("allocated", "reserved", "session"), zip(*held, strict=True), strict=True):
        assert max(sizes[late]) <= max(sizes[early]), name
    chunks = [begin.elapsed_time(middle) for begin, middle, _ in events]
    constant = [middle.elapsed_time(end) for _, middle, end in events]
    growth = statistics.median(chunks[late]) / statistics.median(chunks[early])
    clocks = statistics.median(constant[late]) / statistics.median(constant[early])
    assert min(growth, growth / clocks) <= 1.02, f"chunks x {growth:.4f}, a constant product x {clocks:.4f}"
