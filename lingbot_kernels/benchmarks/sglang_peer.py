"""sglang's own LingBot-World transformer and stage, unmodified, on this library's weights: a peer of the model bench,
and what tests hold the adapter against.

sglang runs without its server here: a process group of one, its arguments as a namespace, its stage without a pipeline.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lingbot_kernels.config import LingBotConfig
from lingbot_kernels.stages.schedule import Schedule

_DIT = "runtime.models.dits.lingbot_world"
_STAGE = "runtime.pipelines_core.stages.model_specific_stages.lingbot_world.lingbot_world_causal_denoising"


def _sglang(module: str) -> Any:
    return importlib.import_module(f"sglang.multimodal_gen.{module}")


def why_not() -> str | None:
    """None where sglang's network and stage can be imported, else what is missing."""
    if importlib.util.find_spec("sglang") is None:
        return "sglang is not installed"
    try:
        for module in (_DIT, _STAGE):
            _sglang(module)
    except Exception as error:  # a half installed engine fails in ways of its own
        return f"sglang {version()} is not importable ({type(error).__name__}: {error})"
    return None


def version() -> str:
    """Of the installed distribution; "unknown" where it has none."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


class SglangPeer:
    """sglang's network and stage, chunk after chunk, with the noise it is given.

    Args:
        config: shapes and window.
        weights: a state dict in the official names; shared, not copied, where the dtype is the one sglang keeps.
        latent_size: (H, W) of the latents.
        schedule: times and sigmas.
        dtype: bfloat16, or float32 for parity (sglang's stage runs in bfloat16).
        interactive: sglang's options of its interactive window, by name.

    Attributes:
        sequence_shard: whether requests ask for their tokens to be shared among ranks, which sglang's groups, joined
            before, must then have.
    """

    sequence_shard = False

    def __init__(
        self,
        config: LingBotConfig,
        weights: Mapping[str, Tensor],
        latent_size: tuple[int, int],
        schedule: Schedule,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        **interactive: Any,
    ) -> None:
        if config.frames_per_chunk != 3:
            raise ValueError(f"frames_per_chunk: got {config.frames_per_chunk}, must be 3")
        self.config, self.schedule, self.device, self.dtype = config, schedule, device, dtype
        self.latent_size = latent_size
        configs = _sglang("configs.models.dits")
        arch = _sglang("configs.models.dits.lingbot_world").LingBotWorldArchConfig(
            patch_size=config.patch_size, text_len=config.text_len, num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim, in_channels=config.in_channels, out_channels=config.out_channels,
            text_dim=config.text_dim, freq_dim=config.freq_dim, ffn_dim=config.ffn_dim, num_layers=config.num_layers,
            eps=config.eps, sink_size=config.sink_frames, num_frames_per_block=config.frames_per_chunk,
            sliding_window_num_frames=config.window_frames,
        )  # fmt: skip
        dit_config = configs.LingBotWorldVideoConfig(arch_config=arch)
        pipelines = _sglang("configs.pipeline_configs.lingbot_world")
        self.pipeline_config = pipelines.LingBotWorldCausalDMDConfig(dit_config=dit_config)
        self.pipeline_config.text_encoder_configs[0].arch_config.text_len = config.text_len
        for name, value in interactive.items():
            if not hasattr(self.pipeline_config, name):
                raise ValueError(f"{name}: is no option of sglang's interactive window")
            setattr(self.pipeline_config, name, value)
        self.arguments = _arguments(self.pipeline_config)
        _sglang("runtime.server_args").set_global_server_args(self.arguments)
        _join_group_of_one()
        self.transformer = self._transformer(dit_config, arch.param_names_mapping, weights)
        self.stage = self._stage()
        self.session: Any = None
        self.begin()

    def _transformer(self, dit_config: Any, names: Mapping[str, str], weights: Mapping[str, Tensor]) -> Any:
        with _default_dtype(self.dtype), torch.device(self.device):
            transformer = _sglang(_DIT).CausalLingBotWorldTransformer3DModel(dit_config, hf_config={})
        expected = transformer.state_dict()
        loaded = {}
        for name, weight in weights.items():
            theirs = next(re.sub(old, new, name) for old, new in names.items() if re.match(old, name))
            shape, dtype = expected[theirs].shape, expected[theirs].dtype
            loaded[theirs] = weight.reshape(shape).to(dtype)
        transformer.load_state_dict(loaded, assign=True)
        transformer.requires_grad_(False)
        transformer.post_load_weights()
        return transformer.eval()

    def _stage(self) -> Any:
        stage_class = _sglang(_STAGE).LingBotWorldCausalDMDDenoisingStage
        backends = _sglang("runtime.platforms").AttentionBackendEnum
        stage = stage_class.__new__(stage_class)
        stage.transformer, stage.local_attn_size = self.transformer, -1
        stage.num_transformer_blocks = self.config.num_layers
        stage.num_frames_per_block = self.config.frames_per_chunk
        stage.sliding_window_num_frames, stage.sink_size = self.config.window_frames, self.config.sink_frames
        stage.causal_kv_cache = stage.crossattn_cache = None
        stage.attn_backend = SimpleNamespace(get_enum=lambda: backends.TORCH_SDPA)  # which asks for no metadata
        if self.dtype != torch.bfloat16:
            stage._target_dtype = lambda: self.dtype
        return stage

    def begin(self) -> None:
        """A new session."""
        if self.session is not None:
            self.session.dispose()
        self.session = _sglang("runtime.realtime.session").RealtimeSession()
        self.chunks = 0

    @property
    def state(self) -> Any:
        """sglang's state of the session."""
        return _sglang("runtime.realtime.states").get_realtime_causal_dit_state(self.session)

    @torch.no_grad()
    def chunk(
        self,
        noise: Tensor,
        renoise: Tensor,
        *,
        text: Tensor,
        camera: Tensor | None,
        condition: Tensor | None = None,
        conditions: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The next chunk's clean latents [1, C, F, H, W], in sglang's dtype, its context update done.

        Args:
            noise, renoise, camera, condition: as `CausalDenoisingStage.denoise_chunk` takes them; condition zeros where
                None.
            text: [1, L <= text_len, text_dim]; padded with zeros.
            conditions: sglang's realtime conditions by name: a prompt switch, camera actions.
        """
        batch, channels, frames, height, width = noise.shape
        if condition is None:
            condition = noise.new_zeros(batch, self.config.in_channels - channels, frames, height, width)
        padded = text.new_zeros(batch, self.config.text_len, text.shape[2], dtype=self.dtype)
        padded[:, : text.shape[1]] = text
        request = SimpleNamespace(
            latents=noise.to(self.dtype), image_latent=condition.repeat(1, 1, self.chunks + 1, 1, 1), image_embeds=[],
            timesteps=torch.tensor(self.schedule.times, device=self.device), scheduler=_Scheduler(self, renoise),
            prompt_embeds=[padded], c2ws_plucker_emb=camera, condition_inputs=dict(conditions or {}), extra={},
            session=self.session, block_idx=self.chunks, generator=None, enable_sequence_shard=self.sequence_shard,
            realtime_session_id=None, request_id=None, realtime_causal_kv_sample_tokens=None,
        )  # fmt: skip
        request = self.stage.forward(request, self.arguments)
        self.chunks += 1
        return request.latents

    @contextlib.contextmanager
    def observed(self, observe: Callable[[str, int], AbstractContextManager[object]]) -> Iterator[None]:
        """Within, `observe` is called around each forward, as `CausalDenoisingStage` calls it."""
        open_spans: list[AbstractContextManager[object]] = []

        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            phase = ("context", -1) if kwargs.get("skip_final_projection") else ("denoise", 0)
            open_spans.append(observe(*phase))
            open_spans[-1].__enter__()

        def after(module: Any, args: Any, output: Any) -> None:
            open_spans.pop().__exit__(None, None, None)

        handles = [
            self.transformer.register_forward_pre_hook(before, with_kwargs=True),
            self.transformer.register_forward_hook(after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def fast_paths(self) -> str:
        """Which of sglang's fast paths have served: its attention backend, and its gates of fused norms."""
        block = self.transformer.blocks[0]
        gates = {
            "norm1": block._norm1_modulation_gate,
            "norm3": block._cross_norm_gate,
            "residual": block._self_residual_gate,
        }
        told = [f"{name} {_served(gate)}" for name, gate in gates.items()]
        return f"{block.attn1.attn.backend.name} attention; {', '.join(told)}"


class _Scheduler:
    """What sglang's stage asks of a scheduler: times, sigmas, and to add noise, which is the noise it is handed."""

    def __init__(self, peer: SglangPeer, renoise: Tensor) -> None:
        self.timesteps = torch.tensor(peer.schedule.times, device=peer.device)
        self.sigmas = torch.tensor(peer.schedule.sigmas, dtype=torch.float64, device=peer.device)
        self._left = list(zip(peer.schedule.noise_sigmas, renoise, strict=True))

    def add_noise(self, clean: Tensor, _: Tensor, __: Tensor) -> Tensor:
        """clean [B * F, C, H, W], rounded as sglang rounds it."""
        sigma, noise = self._left.pop(0)
        noise = noise.transpose(1, 2).flatten(0, 1).to(clean.dtype)
        return ((1 - sigma) * clean.double() + sigma * noise.double()).to(clean.dtype)


def _served(gate: Any) -> str:
    return "refused" if gate.disabled else "fused" if gate.verified else "plain"


def _arguments(pipeline_config: Any) -> SimpleNamespace:
    """sglang's server arguments, as far as its transformer and stage read them."""
    quantised = _sglang("configs.quantization.qvg_kv").QVGKVQuantArgs()
    return SimpleNamespace(
        attention_backend=None, attention_backend_config=None, comfyui_mode=False, disable_autocast=False,
        enable_cfg_parallel=False, enable_breakable_cuda_graph=False, enable_layerwise_nvtx_marker=False,
        enable_torch_compile=False, kv_gather_degree=1, sp_split_auto=False, model_loaded={}, model_paths={},
        pipeline_config=pipeline_config, kv_cache_quant_config=quantised,
    )  # fmt: skip


def _join_group_of_one() -> None:
    groups = _sglang("runtime.distributed.parallel_state")
    if groups.model_parallel_is_initialized():
        return
    with tempfile.NamedTemporaryFile(prefix="lingbot-kernels-", delete=False) as file:
        name = file.name
    groups.maybe_init_distributed_environment_and_model_parallel(
        tp_size=1, sp_size=1, distributed_init_method=f"file://{name}"
    )


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
