"""What a session and a model's weights need in memory, part by part, told from shapes before anything is allocated."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from lingbot_kernels.config import LingBotConfig
from lingbot_kernels.quantization import Int8Recipe, product_shapes
from lingbot_kernels.reference.rotate_quantize import padded_width
from lingbot_kernels.scalars import as_count, as_counts

GIB = 2**30
WORKSPACE = 64 * 2**20  # of cuBLAS and cuBLASLt, 32 MiB each on Hopper, for a stream they run on


class NotEnoughMemory(MemoryError):
    """A request that can't fit on its device; nothing has been allocated for it.

    Attributes:
        plan: what it needs, by part.
        free: bytes that are free.
    """

    def __init__(self, message: str, plan: MemoryPlan, free: int) -> None:
        super().__init__(message)
        self.plan, self.free = plan, free


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part, on one device (of one rank, where a chunk is shared).

    Attributes:
        weights: the model's parameters.
        kv_cache, camera_modulation, text, time_embeddings, rope: what the session keeps, exactly; the names are those
            of `RealtimeCausalDiTState.stats`; text at most, where a key stands for the prompt's padding.
        exchange: where Q and attention's output arrive from the other ranks, where these write to each other's memory.
        forward: what comes and goes within a chunk, at most: its inputs, a forward's activations, library workspaces.
        cuda_graphs: the graphs' private pool, at most: one forward's activations, held until the session ends.
    """

    weights: int = 0
    kv_cache: int = 0
    camera_modulation: int = 0
    text: int = 0
    time_embeddings: int = 0
    rope: int = 0
    exchange: int = 0
    forward: int = 0
    cuda_graphs: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Name -> bytes of every part that needs any."""
        return {name: count for name, count in dataclasses.asdict(self).items() if count}

    def __str__(self) -> str:
        return ", ".join(f"{name} {count / GIB:.2f}" for name, count in self.parts().items())


def weights_memory(cfg: LingBotConfig, dtype: torch.dtype, recipe: Int8Recipe | None = None) -> MemoryPlan:
    """The parameters of a network, quantised by `recipe` where given; each rank of a shard has all of them."""
    count = cfg.num_parameters() * dtype.itemsize
    for product, shapes in product_shapes(cfg).items():
        blocks = sum(recipe is not None and recipe.has(block, product) for block in range(cfg.num_layers))
        for rows, columns in shapes:  # a code for each value, a float32 scale for each row
            count += blocks * rows * (padded_width(columns) + 4 - columns * dtype.itemsize)
    return MemoryPlan(weights=count)


def session_memory(
    cfg: LingBotConfig,
    grid: tuple[int, int],
    dtype: torch.dtype,
    *,
    batch: int = 1,
    frames: int | None = None,
    ranks: int = 1,
    camera: bool = True,
    rope_cache: bool = True,
    time_cache: bool = True,
    camera_cache: bool = True,
    text_cache: bool = True,
    time_entries: int = 5,
    cuda_graphs: bool = True,
    recipe: Int8Recipe | None = None,
) -> MemoryPlan:
    """What a session will hold besides the weights, on the first rank, which has as many tokens as any.

    Args:
        grid: rows and columns of tokens in a frame.
        dtype: of the model and its caches.
        frames: of a chunk; the configured ones where None.
        ranks: GPUs that share each chunk.
        camera: whether chunks come with a camera.
        rope_cache, time_cache, camera_cache, text_cache, time_entries: as of `RealtimeCausalDiTState`.
        cuda_graphs: whether steady forwards may replay graphs.
        recipe: of a quantised model.

    Raises:
        ValueError, TypeError: a size that isn't an int of 1 or more (time_entries: 0 or more), by its name.
    """
    rows, columns = as_counts("grid", grid, 1, "(rows, columns)")
    batch, ranks = as_count("batch", batch, 1), as_count("ranks", ranks, 1)
    frames = cfg.frames_per_chunk if frames is None else as_count("frames", frames, 1)
    time_entries = as_count("time_entries", time_entries, 0)
    d, layers, element = cfg.dim, cfg.num_layers, dtype.itemsize
    wide = torch.promote_types(dtype, torch.float32).itemsize
    frame_tokens = rows * columns
    chunk_tokens = frames * frame_tokens
    own_tokens = -(-chunk_tokens // ranks)
    modulation = (6 * layers + 2) * d * wide  # of one timestep
    graphed = cuda_graphs and text_cache and (camera_cache or not camera)
    activations = _activations(cfg, dtype, batch * own_tokens, ranks, camera and not camera_cache, recipe is not None)
    positions = batch * chunk_tokens * cfg.patch_volume
    int8_qk = recipe is not None and recipe.attention == "int8_qk"
    key = d + 4 * cfg.num_heads if int8_qk else d * element  # a code for each value, a float32 scale for each head
    key_value = (key + d * element) // ranks
    latents = positions * (3 * cfg.in_channels * element + 8 * cfg.out_channels * wide)
    rays = 2 * positions * cfg.camera_channels * wide * camera  # this chunk's, and the one that a key still holds
    return MemoryPlan(
        kv_cache=layers * batch * cfg.window_frames * frame_tokens * key_value,
        camera_modulation=2 * layers * batch * own_tokens * d * element if camera and camera_cache else 0,
        text=2 * layers * batch * cfg.text_len * d * element if text_cache else 0,
        time_embeddings=time_entries * modulation if time_cache else 0,
        rope=own_tokens * cfg.head_dim * 4 if rope_cache else 0,
        exchange=batch * own_tokens * (key + d * element) if ranks > 1 else 0,
        forward=latents + rays + max(activations, _preparations(cfg, dtype, batch, own_tokens, camera)) + WORKSPACE,
        cuda_graphs=latents + activations + 2 * modulation + WORKSPACE if graphed else 0,
    )


def _activations(
    cfg: LingBotConfig, dtype: torch.dtype, rows: int, ranks: int, camera_per_block: bool, quantized: bool
) -> int:
    """The most that a block's phases have at once: [rows, d] tensors of the residual stream (r) and the model (e), and
    codes (c) of what a product takes.
    """
    e, r = dtype.itemsize, torch.promote_types(dtype, getattr(torch, cfg.residual_dtype)).itemsize
    c = (padded_width(cfg.dim) / cfg.dim + 4 / cfg.dim) if quantized else 0
    hidden = cfg.ffn_dim / cfg.dim * e * (1 if dtype.itemsize == 2 else 2)  # GELU is in the product's epilogue in bf16
    hidden += (padded_width(cfg.ffn_dim) + 4) / cfg.dim if quantized else 0
    phases = (
        r
        + c
        + (9 if ranks == 1 else 13) * e,  # norm, qkv, q, attended in halves, merged, output; the exchange's buffers
        2 * r + 6 * e + c,  # cross-attention
        2 * r + 3 * e + hidden,  # MLP
        3 * r + 4 * e + c,  # a residual pass
    )
    kept = 3 * e if camera_per_block else 0  # the camera's embedding and this block's scale and shift
    return int((max(phases) + kept) * rows * cfg.dim)


def _preparations(cfg: LingBotConfig, dtype: torch.dtype, batch: int, own_tokens: int, camera: bool) -> int:
    """The most that filling a store has at once, besides what it keeps."""
    d, e = cfg.dim, dtype.itemsize
    wide = torch.promote_types(dtype, torch.float32).itemsize
    time = 6 * d * (d if wide != e else 0) * wide + 3 * (6 * cfg.num_layers + 6) * d * wide  # weights widened
    text = batch * cfg.text_len * (2 * cfg.text_dim + 5 * d) * e
    channels = cfg.camera_channels * cfg.patch_volume
    rays = batch * own_tokens * max(2 * channels, channels + 5 * d) * e if camera else 0
    return max(time, text, rays)


def free_bytes(device: torch.device) -> int | None:
    """Bytes of a CUDA device that are free or kept for reuse by torch's allocator; None where that can't be told."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def shortage(subject: str, plan: MemoryPlan, device: torch.device, advice: str = "") -> NotEnoughMemory | None:
    """The error to raise where `plan` does not fit on `device` now; None where it does, or nobody knows."""
    free = free_bytes(device)
    if free is None or plan.total <= free:
        return None
    message = (
        f"{subject}: needs {plan.total / GIB:.2f} GiB on {device} ({plan}), must be at most the {free / GIB:.2f} GiB "
        f"free there{advice and '; '}{advice}"
    )
    return NotEnoughMemory(message, plan, free)


def savings(plan: MemoryPlan, cfg: LingBotConfig) -> str:
    """What a session can give up, and what that saves, in words."""
    choices = [
        ("RealtimeCausalDiTState(camera_cache=False)", plan.camera_modulation),
        ("RealtimeCausalDiTState(text_cache=False)", plan.text),
        ("model.cuda_graphs = False", plan.cuda_graphs),
        ("each frame less in window_frames", plan.kv_cache // cfg.window_frames),
    ]
    return "to save: " + ", ".join(f"{what} ({count / GIB:.2f} GiB)" for what, count in choices if count)


def check_weights(
    cfg: LingBotConfig,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    recipe: Int8Recipe | None = None,
) -> None:
    """Raise NotEnoughMemory where the parameters do not fit on `device` (torch's default where None)."""
    where = torch.get_default_device() if device is None else torch.device(device)
    error = shortage("weights", weights_memory(cfg, dtype or torch.get_default_dtype(), recipe), where)
    if error is not None:
        raise error
