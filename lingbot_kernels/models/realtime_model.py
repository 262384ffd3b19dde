"""What a causal video network is to those who run it, whatever its layers are: loaded and saved, quantised, shared
among ranks, and asked for forwards of a session's chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lingbot_kernels.config import LingBotConfig
from lingbot_kernels.models import checkpoint, session_forward
from lingbot_kernels.models._inputs import Dtype, as_dtype
from lingbot_kernels.models.quantize import quantize
from lingbot_kernels.parallel.sequence_shard import SequenceShard
from lingbot_kernels.parallel.shard_group import ShardGroup
from lingbot_kernels.quantization import Int8Recipe, recipe_of
from lingbot_kernels.realtime import memory
from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState
from lingbot_kernels.realtime.chunk_inputs import TimeEmbeddings
from lingbot_kernels.realtime.kv_cache import CacheLayout, RingMemory
from lingbot_kernels.realtime.saved_session import SessionOwner
from lingbot_kernels.realtime.weights import WeightsIdentity, fingerprint

if TYPE_CHECKING:
    from typing_extensions import Self


class RealtimeModel(nn.Module):
    """The part of `CausalLingBotTransformer` that knows of files, precision, ranks and sessions, and of no layer.

    A network adds its modules, the pass over tokens `_run`, and what its inputs become, `_embed_time` and
    `_embed_camera`.

    Attributes:
        cuda_graphs: whether steady forwards may replay CUDA graphs.
        weighted_padding: whether cross-attention sees a text's zero padding as one key that counts for all of its rows,
            which they equal: the same attention but for its rounding, at the cost of the prompt's own length. False
            keeps the bits of the padded form. It may be set between forwards.
    """

    blocks: Sequence[Any]  # each with `camera_modulation`, and `project_text` in its `cross_attn`
    head: Any
    text_embedding: Callable[[Tensor, int], Tensor]
    _run: Callable[..., Tensor | None]
    _embed_time: Callable[[float], TimeEmbeddings]
    _embed_camera: Callable[[Tensor, SequenceShard], Tensor]

    def __init__(
        self, cfg: LingBotConfig, *, device: torch.device | str | None = None, dtype: Dtype | None = None
    ) -> None:
        """Of weights in `dtype` on `device`; NotEnoughMemory where they can't fit."""
        memory.check_weights(cfg, as_dtype("dtype", dtype), device)
        super().__init__()
        self.config = cfg
        self.recipe: Int8Recipe | None = None
        self.cuda_graphs = True
        self.weighted_padding = False
        self.shard_group = ShardGroup()
        self._weights = WeightsIdentity()
        self._disown_sessions()
        self.register_load_state_dict_post_hook(RealtimeModel._disown_sessions)

    @torch.inference_mode(False)  # what a session keeps may be written again outside the caller's inference mode
    @torch.no_grad()
    def forward(
        self,
        latents: Tensor,
        text: Tensor,
        timestep: float,
        *,
        state: RealtimeCausalDiTState,
        start_frame: int,
        camera: Tensor | None = None,
        step_index: int = 0,
        update_cache_only: bool = False,
    ) -> Tensor | None:
        """One forward of a chunk: a denoise step, or the context update. It waits, on the device, for a context update
        of the session that still runs on another stream.

        Args:
            latents: [B, in_channels, F, H, W]: noisy latents, then mask and image condition.
            text: [B, L <= text_len, text_dim] text embeddings; zero-padded to text_len inside (`weighted_padding`).
            timestep: one value for the chunk, a Python float; a tensor is refused, since reading it would wait.
            state: the session; its ring takes the chunk's K and V.
            start_frame: absolute index of the chunk's first latent frame; the next one, or the current chunk's.
            camera: [B, 384, F, H, W] Pluecker embedding, 8 x 8 pixels folded into channels; None: no camera.
            step_index: index in the denoising loop; -1 in the context update.
            update_cache_only: write K/V, skip all that only the output needs, and return None.

        Returns:
            Flow prediction, float32 [B, out_channels, F, H, W] (float64 from a float64 model), or None.

        Raises:
            ValueError, TypeError: naming the argument; the session is then as it was.
            NotEnoughMemory: a session begins and can't fit; nothing has been allocated for it.
        """
        return session_forward.forward(
            self, latents, text, timestep, state=state, start_frame=start_frame, camera=camera, step_index=step_index,
            update_cache_only=update_cache_only,
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: Dtype | None = None,
        device: torch.device | str = "cpu",
        cfg: LingBotConfig | None = None,
        precision: str | Int8Recipe | None = None,
    ) -> Self:
        """The model of a checkpoint folder (safetensors shards in any of the three namings), in `dtype` on `device`.

        The configuration is `cfg`, or the folder's config.json, or read off the shapes. Weights go from the mapped file
        straight into the parameters: memory stays near one copy, of the int8 weights where they are quantised.

        Args:
            dtype: also by name, such as "bfloat16", "bf16" or "torch.bfloat16"; bfloat16 where None.
            precision: "bfloat16": the products in `dtype`; "int8", "int8_qk" or an Int8Recipe: quantised while loading.
                None: as `save_pretrained` wrote the folder, which is "bfloat16" for every other checkpoint.

        Raises:
            CheckpointError: naming every missing, unexpected, wrongly shaped or unreadable entry, in one message.
            NotEnoughMemory: the weights can't fit on `device`; nothing has been allocated there.
            ValueError: no such dtype or precision, or another precision than the folder's weights are quantised in.
        """
        dtype = as_dtype("dtype", dtype)
        stored = checkpoint.stored_recipe(folder)
        recipe = stored if precision is None else recipe_of(precision)
        cfg, dtype = cfg or checkpoint.infer_config(folder), dtype or torch.bfloat16
        memory.check_weights(cfg, dtype, device, recipe)
        with torch.device("meta"):
            model = cls(cfg, dtype=dtype)
        checkpoint.load_checkpoint(model, folder, device=device, recipe=recipe)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the weights under their official names as safetensors shards with an index, and config.json.

        Quantised weights are written as they are: int8 with float32 scales, and the recipe in config.json.
        """
        checkpoint.save_checkpoint(self, folder)

    def quantize(self, recipe: Int8Recipe | None = None) -> None:
        """Run the recipe's products (the default one's where None) in int8 from now on: each weight is replaced by its
        codes, in place and one after the other. Sessions begun before must start again.

        Raises:
            ValueError: the recipe names what this network has not, or attention in int8 where that can't be (the model
                is not bfloat16, or its heads are not of 64 or 128), a weight can't be quantised, or they already are;
                the model is then as it was.
        """
        quantize(self, recipe or Int8Recipe())
        self._disown_sessions()

    def shard_sequence(self, group: dist.ProcessGroup | None = None, layout: str = "ulysses") -> None:
        """Share every later chunk among the ranks of `group`, the default process group where None.

        Called on every rank, with the same weights; from then on each rank calls forward with the same arguments and
        gets the same result. Sessions begun before must start again. GPUs of one host that reach each other's memory
        write to it; otherwise, and where self-attention has Q and K in int8, the exchanges are all-to-all collectives,
        and `shard_group.exchange` says why.

        Raises:
            ValueError, RuntimeError: on every rank alike, as `ShardGroup.join` says.
        """
        self.shard_group = ShardGroup.join(group, layout, self)
        self._disown_sessions()

    def weights_changed(self) -> None:
        """Say that weights were written where it can't be seen: sessions then drop what the old ones made, their text
        K/V, time embeddings, camera modulation and CUDA graphs, and go on with their window's keys and values.

        Needed after writes through `parameter.data` (`parameter.data += delta`) and to weights made in inference mode.
        Everything else is noticed: parameters or modules replaced, writes in place, adapters merged or switched. After
        `load_state_dict` of the whole model a session that has begun is refused.
        """
        self._weights.renew()

    @property
    def precision(self) -> str:
        """What the blocks' products run in: the dtype's name, or "int8" or "int8_qk" where they are quantised."""
        return str(self.dtype).removeprefix("torch.") if self.recipe is None else self.recipe.precision

    @property
    def int8_qk(self) -> bool:
        """Whether self-attention has Q and K in int8."""
        return self.recipe is not None and self.recipe.attention == "int8_qk"

    @property
    def residual_dtype(self) -> torch.dtype:
        """Dtype of the residual stream: the configured one, or the model's own where that is wider."""
        return torch.promote_types(self.dtype, getattr(torch, self.config.residual_dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.head.modulation.dtype

    @property
    def device(self) -> torch.device:
        return self.head.modulation.device

    @property
    def session_owner(self) -> object:
        """What sessions of this model belong to; another one once it was loaded or shared anew."""
        return self._owner

    def session_facts(self) -> dict[str, Any]:
        """What must be the same in a model that is to go on with a saved session, the weights apart."""
        recipe = None if self.recipe is None else repr(self.recipe)
        return {**self.config.to_dict(), "dtype": str(self.dtype), "recipe": recipe, "ranks": self.shard_group.ranks}

    def weights_fingerprint(self) -> str:
        """What stands for the values of the parameters; reads all of them."""
        return fingerprint(self)

    def session_memory(self, state: RealtimeCausalDiTState, layout: CacheLayout) -> RingMemory | None:
        """What the rings of a session that begins lie in; NotEnoughMemory where it can't fit."""
        return session_forward.ring_memory(self, state, layout, self.config.frames_per_chunk, self.config.camera)

    def cache_layout(self, batch: int, grid: tuple[int, int]) -> CacheLayout:
        """The K/V ring of a session of `batch` videos with `grid` (rows, columns) tokens a frame, on this rank."""
        cfg = self.config
        return CacheLayout(
            cfg.num_layers, batch, cfg.num_heads // self.shard_group.ranks, cfg.head_dim, grid, cfg.window_frames,
            cfg.sink_frames, self.dtype, self.device, torch.int8 if self.int8_qk else None,
        )  # fmt: skip

    def _disown_sessions(self, _: object = None) -> None:
        """Refuse sessions that have begun: all of the weights, or the ranks, are others."""
        self._owner = SessionOwner(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of a model has sessions of its own."""
        super().__setstate__(state)
        self._disown_sessions()

    def _prepare_cached_rope_for_sequence_shard(
        self, state: RealtimeCausalDiTState, num_tokens: int, token_start: int
    ) -> Tensor:
        return session_forward.rope(self, state, num_tokens, token_start)

    def _prepare_cached_time_embeddings(
        self, state: RealtimeCausalDiTState, timestep: float, step_index: int
    ) -> TimeEmbeddings:
        return session_forward.time_embeddings(self, state, timestep, step_index)
