"""FlashDreams' Wan network with LingBot-World's camera conditioner, on this library's weights: a peer of the model
bench.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_kernels.benchmarks.gate import relative_error
from lingbot_kernels.benchmarks.rows import ABSENT, FAILED, GREEN, RED, failure_note
from lingbot_kernels.benchmarks.scene import chunks_of_a_window
from lingbot_kernels.benchmarks.timing import event_ms
from lingbot_kernels.models.embeddings import patchify
from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer
from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState

if TYPE_CHECKING:
    from lingbot_kernels.benchmarks.model import ModelBench
    from lingbot_kernels.benchmarks.model_session import BenchSession

FLASHDREAMS = "flashdreams"


def measure(bench: ModelBench, session: BenchSession, ceiling_ms: float) -> bool:
    """A row of its denoise step at a full window, gated against ours on a first chunk; False if it disagrees."""
    missing = why_not()
    if missing is not None:
        bench.add("denoise_step", FLASHDREAMS, peer=True, gate=ABSENT, note=missing)
        return True
    try:
        error, times = _run(bench, session)
    except Exception as failure:  # a peer's failure is a row of its own, not the end of ours
        bench.add("denoise_step", FLASHDREAMS, peer=True, gate=FAILED, note=failure_note(failure))
        return True
    gate = GREEN if error < 0.05 else RED
    bench.add(
        "denoise_step", FLASHDREAMS, times, ceiling_ms, peer=True, gate=gate, error=error, note="compiled, graphed"
    )
    return gate == GREEN


def _run(bench: ModelBench, session: BenchSession) -> tuple[float, list[float]]:
    """(Relative difference of the first chunk's flow from ours, milliseconds of its steps at a full window)."""
    model = session.model
    peer = FlashDreamsPeer(model, session.text, bench.grid)
    camera = session.new_camera()
    embedding = model._embed_camera(camera)
    latents = session.new_latents()
    fresh = RealtimeCausalDiTState(camera_cache=False)
    ours = model(latents, session.text, 937.5, state=fresh, start_frame=0, camera=camera)
    assert isinstance(ours, Tensor)
    theirs = peer.forward(latents, 937.5, embedding, 0)
    _, ph, pw = model.config.patch_size
    shaped = theirs.unflatten(1, (session.latents[2], *bench.grid)).unflatten(-1, (-1, ph, pw))
    shaped = shaped.permute(0, 4, 1, 2, 5, 3, 6).reshape(ours.shape).float()
    error = relative_error(shaped, ours)
    peer.end_chunk(0)
    fresh.dispose()
    chunks = chunks_of_a_window(model.config)
    for chunk in range(1, chunks + 2):
        for step in range(3):
            peer.forward(latents, 937.5, embedding, chunk, first=step == 0)
        peer.end_chunk(chunk)
    peer.forward(latents, 937.5, embedding, chunks + 2)
    times = [event_ms(lambda: peer.forward(latents, 937.5, embedding, chunks + 2, first=False)) for _ in range(20)]
    return error, times[5:]


def why_not() -> str | None:
    """None where FlashDreams can be imported, else what is missing."""
    if importlib.util.find_spec("flashdreams") is None:
        return "flashdreams is not installed"
    try:
        _network_module()
    except ImportError as error:
        return f"flashdreams is not importable ({error})"
    return None


def _network_module() -> types.ModuleType:
    """The module of its Wan network, without the recipes' package code, which imports whole pipelines."""
    root = Path(importlib.import_module("flashdreams").__path__[0])
    for name, folder in (("flashdreams.recipes", "recipes"), ("flashdreams.recipes.wan", "recipes/wan")):
        if name not in sys.modules:
            bare = types.ModuleType(name)
            bare.__path__ = [str(root / folder)]
            sys.modules[name] = bare
    return importlib.import_module("flashdreams.recipes.wan.transformer.impl.network")


class FlashDreamsPeer:
    """The peer's network on `model`'s weights (shared, not copied), compiled and graphed as its own recipe does.

    Args:
        model: whose weights, shapes and window to use; its window must hold a whole number of chunks.
        text: [1, text_len, text_dim].
        grid: rows and columns of tokens in a frame.
    """

    def __init__(self, model: CausalLingBotTransformer, text: Tensor, grid: tuple[int, int]) -> None:
        cfg, device, dtype = model.config, model.device, model.dtype
        module = _network_module()
        rope = importlib.import_module("flashdreams.core.attention").RotaryPositionEmbedding3D
        compile_module = importlib.import_module("flashdreams.infra.compile").compile_module
        graph_wrapper = importlib.import_module("flashdreams.infra.cuda_graph").CUDAGraphWrapper
        config = module.WanDiTNetworkConfig(
            dim=cfg.dim, ffn_dim=cfg.ffn_dim, num_heads=cfg.num_heads, num_layers=cfg.num_layers,
            in_dim=cfg.in_channels, out_dim=cfg.out_channels, patch_size=cfg.patch_size, text_len=cfg.text_len,
            text_dim=cfg.text_dim, freq_dim=cfg.freq_dim, eps=cfg.eps,
        )  # fmt: skip
        with torch.device("meta"):
            network = module.WanDiTNetwork(config)
            for block in network.blocks:
                _add_camera(block, cfg.dim)
        weights = model.state_dict()
        outside = ("patch_embedding_wancamctrl", "c2ws_hidden_states")
        network.load_state_dict({k: v for k, v in weights.items() if not k.startswith(outside)}, assign=True)
        network.requires_grad_(False)
        network.update_parameters_after_loading_checkpoint()
        self._model = model
        frame = grid[0] * grid[1]
        self.cache = network.initialize_cache(
            cfg.frames_per_chunk * frame,
            (cfg.window_frames - cfg.sink_frames) * frame,
            cfg.sink_frames * frame,
            text.to(dtype),
        )
        self._rope = rope(
            head_dim=cfg.head_dim,
            len_h=grid[0],
            len_w=grid[1],
            len_t=cfg.frames_per_chunk,
            interleaved=True,
            device=device,
        )
        self._freqs = self._rope.shift_t(0)
        self._network = compile_module(network)
        self._graphed = graph_wrapper(self._network, warmup_iters=2)
        self._chunks_in_window = cfg.window_frames // cfg.frames_per_chunk

    @torch.no_grad()
    def forward(self, latents: Tensor, timestep: float, camera: Tensor, chunk: int, *, first: bool = True) -> Tensor:
        """One forward of chunk number `chunk`: tokens [1, S, 4 * out_channels], channels (c, pt, ph, pw).

        Args:
            latents: [1, in_channels, F, H, W].
            camera: [1, S, d] camera embedding (`CausalLingBotTransformer._embed_camera`): it has that outside its
                blocks.
            first: whether this is the chunk's first forward, which rolls the cache.
        """
        if first:
            self.cache.before_update(chunk)
            self._freqs = self._rope.shift_t(chunk)
        call = self._graphed if chunk >= self._chunks_in_window else self._graphed.drain
        return call(
            x=patchify(latents.to(self._model.dtype), self._model.config.patch_size),
            timesteps=torch.full((1,), timestep, device=latents.device),
            cache=self.cache,
            rope_freqs=self._freqs,
            current_chunk_idx=chunk,
            eager_mode=False,
            block_extra_kwargs={"camera": camera},
        )

    def end_chunk(self, chunk: int) -> None:
        """Its bookkeeping after a chunk's last forward."""
        self.cache.after_update(chunk)


def _add_camera(block: Any, dim: int) -> None:
    """LingBot-World's camera injector on a block of the peer, recomputed in every forward, as its plugin does."""
    for name in ("cam_injector_layer1", "cam_injector_layer2", "cam_scale_layer", "cam_shift_layer"):
        setattr(block, name, nn.Linear(dim, dim))
    block.forward = types.MethodType(_block_with_camera, block)


def _block_with_camera(self: Any, x: Tensor, e: Tensor, cache: Any, rope_freqs: Tensor, camera: Tensor) -> Tensor:
    shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = (self.modulation + e).unbind(-2)
    attend: Callable[..., Tensor] = self.self_attn
    y = self.norm1(x) * (1 + scale_sa) + shift_sa
    x = x + attend(y, rope_freqs=rope_freqs, kv_cache=cache.self_attn) * gate_sa
    h = self.cam_injector_layer2(F.silu(self.cam_injector_layer1(camera))) + camera
    x = (1 + self.cam_scale_layer(h)) * x + self.cam_shift_layer(h)
    x = x + self.cross_attn(self.norm3(x), kv_cache=cache.cross_attn)
    y = self.norm2(x) * (1 + scale_ffn) + shift_ffn
    return x + self.ffn(y) * gate_ffn
