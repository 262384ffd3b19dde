"""The realtime loop: a few denoise steps per chunk, then the context update that leaves clean K/V for the chunks to
come.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from lingbot_kernels import nvtx
from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer
from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState, check_session
from lingbot_kernels.realtime.side_stream import check_stream, on_side_stream
from lingbot_kernels.scalars import as_count, as_counts
from lingbot_kernels.stages.schedule import Schedule

CONTEXT_STEP_INDEX = -1
Observer = Callable[[str, int], AbstractContextManager[object]]
Source = Tensor | Callable[[int], Tensor] | Sequence[Tensor] | None


def _observe_nothing(phase: str, index: int) -> AbstractContextManager[object]:
    return contextlib.nullcontext()


class CausalDenoisingStage:
    """Denoises chunk after chunk with one model; all that a session keeps is in its `RealtimeCausalDiTState`.

    Args:
        model: the transformer.
        timesteps: unwarped times from 1000 to 0, one a denoise step; with `sigmas`, the very times the model is told.
        shift: time shift of the schedule.
        schedule: "continuous" (the default; what serving engines use), "official" (the reference code's truncated
            times) or a `Schedule`. Which time the model is told changes the output more than anything else here.
        sigmas, noise_sigmas: explicit sigmas of x0 (one a step) and of re-noising (one a step but the first; those of
            `sigmas` where None).
        observe: called as observe("denoise", step) and observe("context", -1) for a context manager around each
            forward.
    """

    def __init__(
        self,
        model: CausalLingBotTransformer,
        timesteps: Sequence[float] = (1000, 750, 500, 250),
        shift: float = 5.0,
        schedule: str | Schedule = "continuous",
        *,
        sigmas: Sequence[float] | None = None,
        noise_sigmas: Sequence[float] | None = None,
        observe: Observer = _observe_nothing,
    ) -> None:
        self.model = model
        self.schedule = Schedule.make(schedule, timesteps, shift, sigmas, noise_sigmas)
        self.observe = observe

    @torch.no_grad()
    @nvtx.ranged("chunk")
    def denoise_chunk(
        self,
        state: RealtimeCausalDiTState,
        noise: Tensor,
        *,
        text: Tensor,
        condition: Tensor | None = None,
        camera: Tensor | None = None,
        renoise: Tensor | None = None,
        generator: torch.Generator | None = None,
        update_context: bool = True,
        start_frame: int | None = None,
        context_stream: torch.Stream | None = None,
    ) -> Tensor:
        """Denoise the next chunk and, unless told otherwise, update the context with it.

        x0 = x - sigma * v and x = (1 - s) * x0 + s * noise are computed in float64 and rounded to noise's dtype,
        float32 at least. Where a step or the context update fails, session and generator are as they were before the
        chunk, and the same call gives the bits of one that never failed.

        Args:
            noise: [B, out_channels, F, H, W], any float dtype: where the first step starts, taken as it is.
            text: [B, L, text_dim].
            condition: [B, in_channels - out_channels, F, H, W] mask and image latent; zeros where None.
            camera: [B, 384, F, H, W], or None.
            renoise: [steps - 1, B, out_channels, F, H, W]; drawn from `generator` (torch's own where None) if None,
                which must stand alike on every rank of a sharded model.
            update_context: False hands the chunk out first; call `update_context` before the next chunk.
            start_frame: absolute index of the chunk's first latent frame; the session's next one where None.
            context_stream: where the context update runs, see `update_context`; what the caller launches next, such as
                the chunk's decoder, then overlaps with it.

        Returns:
            Clean latents of noise's shape, float32 (float64 for float64 noise).

        Raises:
            ValueError, TypeError: naming the argument.
        """
        side = check_stream("context_stream", context_stream, self.model.device)
        if context_stream is not None and not update_context:
            raise ValueError("context_stream: got one, must be None with update_context=False, as nothing runs on it")
        check_session(state)
        self._check_latents("noise", noise)
        _check_given(text, camera)
        _check_generator(generator)
        noise = noise.to(torch.promote_types(noise.dtype, torch.float32))
        renoise_shape = (len(self.schedule.times) - 1, *noise.shape)
        if renoise is not None:
            _check_companion("renoise", renoise, renoise_shape, noise.device)
        condition = self._condition(condition, noise)
        text, camera = _versioned(text), None if camera is None else _versioned(camera)
        start_frame = state.next_frame if start_frame is None else start_frame
        with state.attempt(_rewinding(generator, noise.device)):
            if renoise is None:
                self.model.shard_group.agree_on_noise(generator, noise.device)
                renoise = _draw(renoise_shape, noise, generator)
            clean = self._denoise(state, noise, renoise, condition, text, camera, start_frame)
            if update_context:
                self._update_causal_context_cache(state, clean, condition, text, camera, side)
        return clean

    def _denoise(
        self,
        state: RealtimeCausalDiTState,
        noise: Tensor,
        renoise: Tensor,
        condition: Tensor,
        text: Tensor,
        camera: Tensor | None,
        start_frame: int,
    ) -> Tensor:
        """The schedule's steps: [B, C, F, H, W] noise -> clean latents."""
        x, schedule = noise, self.schedule
        for step, (time, sigma) in enumerate(zip(schedule.times, schedule.sigmas, strict=True)):
            if step:
                s = schedule.noise_sigmas[step - 1]
                x = ((1 - s) * x.double() + s * renoise[step - 1].double()).to(noise.dtype)
            with nvtx.range(f"step {step}"), self.observe("denoise", step):
                flow = self.model(
                    torch.cat([x.to(condition.dtype), condition], dim=1),
                    text,
                    time,
                    state=state,
                    start_frame=start_frame,
                    camera=camera,
                    step_index=step,
                )
            x = (x.double() - sigma * flow.double()).to(noise.dtype)
            if step == 0:  # which took the arguments
                state.runtime_cache["time_embeddings"].resize(len(schedule.times) + 1)
        return x

    @torch.no_grad()
    def update_context(
        self,
        state: RealtimeCausalDiTState,
        chunk: Tensor,
        *,
        text: Tensor,
        condition: Tensor | None = None,
        camera: Tensor | None = None,
        stream: torch.Stream | None = None,
    ) -> None:
        """Leave the K/V of the finished, clean chunk in the session's caches: what later chunks will attend to.

        Args:
            chunk: what `denoise_chunk(update_context=False)` returned; the rest as it was given there.
            stream: a CUDA stream to run on, after all that the current stream was given so far; the session's next
                forward waits for it on the device. The bits are those of the plain order. The arguments may be dropped,
                and `chunk` and `condition` overwritten, by later work of the current stream; `text` and `camera` are
                still read. Without CUDA graphs each stream keeps memory for a forward's activations of its own. A
                stream of the CPU changes nothing.

        Raises:
            ValueError, TypeError: the session has no current chunk, or an argument doesn't fit.
        """
        side = check_stream("stream", stream, self.model.device)
        check_session(state)
        self._check_latents("chunk", chunk)
        _check_given(text, camera)
        if state.kv_cache is None:
            raise ValueError("state: got one without a current chunk; call denoise_chunk first")
        condition = self._condition(condition, chunk)
        camera = None if camera is None else _versioned(camera)
        self._update_causal_context_cache(state, chunk, condition, _versioned(text), camera, side)

    def rollout(
        self,
        state: RealtimeCausalDiTState,
        num_chunks: int,
        *,
        text: Source,
        latent_size: tuple[int, int] | None = None,
        noise: Source = None,
        condition: Source = None,
        camera: Source = None,
        renoise: Source = None,
        generator: torch.Generator | None = None,
        start_frame: int | None = None,
        update_context: bool = True,
        context_stream: torch.Stream | None = None,
    ) -> Iterator[Tensor]:
        """Denoise `num_chunks` chunks, one after another, handing each out as soon as it is there.

        Memory is bounded and the time a chunk takes does not grow with their number.

        Args:
            text: [B, L, text_dim] for all chunks, or a callable or sequence that gives each chunk its own.
            latent_size: (H, W) of the latents; may be left out where `noise` or `camera` is a tensor.
            noise, condition, camera: None, or for the whole rollout [B, C, num_chunks * F, H, W], or a callable or
                sequence that gives each chunk its own. noise None: drawn from `generator`.
            renoise: a callable or sequence, as in `denoise_chunk`.
            start_frame: of the first chunk; the session's next frame where None.
            update_context, context_stream: as in `denoise_chunk`.

        Raises:
            ValueError, TypeError: naming the argument; at once, or at the chunk that has it.
        """
        check_session(state)
        num_chunks = as_count("num_chunks", num_chunks, 0)
        _check_generator(generator)
        if latent_size is not None:
            rows, columns = as_counts("latent_size", latent_size, 1, "(H, W)")
            latent_size = (rows, columns)
        for name, source in (("text", text), ("noise", noise), ("condition", condition), ("camera", camera)):
            if isinstance(source, np.ndarray):
                raise TypeError(f"{name}: got a numpy array, must be a tensor; torch.from_numpy makes one")
        frames = self.model.config.frames_per_chunk

        def chunks() -> Iterator[Tensor]:
            for index in range(num_chunks):
                chunk_text = text if isinstance(text, Tensor) else _pick("text", text, index, frames)
                if chunk_text is None:
                    raise ValueError("text: got None, must be [B, L, text_dim]")
                chunk_camera = _pick("camera", camera, index, frames)
                chunk_noise = _pick("noise", noise, index, frames)
                size = latent_size or (None if chunk_camera is None else chunk_camera.shape[-2:])
                if chunk_noise is None and size is None:
                    raise ValueError("latent_size: got None, must be (H, W) where neither noise nor camera tells it")
                with state.attempt(_rewinding(generator, self.model.device)):
                    if chunk_noise is None:
                        assert size is not None
                        shape = (chunk_text.shape[0], self.model.config.out_channels, frames, *size)
                        chunk_noise = _draw(shape, torch.empty(0, device=self.model.device), generator)
                    chunk = self.denoise_chunk(
                        state,
                        chunk_noise,
                        text=chunk_text,
                        condition=_pick("condition", condition, index, frames),
                        camera=chunk_camera,
                        renoise=None if renoise is None else _pick("renoise", renoise, index, frames),
                        generator=generator,
                        update_context=update_context,
                        start_frame=start_frame if index == 0 else None,
                        context_stream=context_stream,
                    )
                yield chunk

        return chunks()

    def _update_causal_context_cache(
        self,
        state: RealtimeCausalDiTState,
        chunk: Tensor,
        condition: Tensor,
        text: Tensor,
        camera: Tensor | None,
        stream: torch.cuda.Stream | None = None,
        *,
        update_cache_only: bool = True,
    ) -> None:
        """The fifth forward: the clean chunk at t = 0, whose last block ends with its K/V write.

        `update_cache_only=False` runs all of the forward and throws its output away, for comparison.
        """
        latents = torch.cat([chunk.to(condition.dtype), condition], dim=1)
        inputs = (latents, text) if camera is None else (latents, text, camera)
        with (
            nvtx.range("context"),
            on_side_stream(state, stream, *inputs),
            self.observe("context", CONTEXT_STEP_INDEX),
        ):
            self.model(
                latents,
                text,
                0.0,
                state=state,
                start_frame=state.chunk_start_frame,
                camera=camera,
                step_index=CONTEXT_STEP_INDEX,
                update_cache_only=update_cache_only,
            )

    def _check_latents(self, name: str, x: Tensor) -> None:
        channels = self.model.config.out_channels
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: got {kind}, must be a float tensor")
        if x.dim() != 5 or x.shape[1] != channels:
            raise ValueError(f"{name}: got shape {list(x.shape)}, must be [B, {channels}, F, H, W]")

    def _condition(self, condition: Tensor | None, latents: Tensor) -> Tensor:
        cfg, dtype = self.model.config, self.model.dtype
        batch, _, *rest = latents.shape
        shape = (batch, cfg.in_channels - cfg.out_channels, *rest)
        if condition is None:
            return torch.zeros(shape, dtype=dtype, device=latents.device)
        _check_companion("condition", condition, shape, latents.device)
        return condition.to(dtype)


def _check_given(text: Tensor, camera: Tensor | None) -> None:
    """What is handed on to the model must be tensors before anything is drawn or copied."""
    for name, given in (("text", text), ("camera", camera)):
        if not isinstance(given, Tensor) and not (name == "camera" and given is None):
            raise TypeError(f"{name}: got {type(given).__name__}, must be a float tensor")


def _check_generator(generator: torch.Generator | None) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {type(generator).__name__}, must be a torch.Generator or None")


def _check_companion(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """x must be a float tensor of `shape` on the latents' device."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        raise TypeError(f"{name}: got {x.dtype if isinstance(x, Tensor) else type(x).__name__}, must be a float tensor")
    if x.shape != shape or x.device != device:
        raise ValueError(
            f"{name}: got shape {list(x.shape)} on {x.device}, must be {list(shape)} on the latents' {device}"
        )


def _rewinding(generator: torch.Generator | None, device: torch.device) -> Callable[[], object]:
    """What takes the generator (torch's own of `device` where None) back to where it is now."""
    if generator is None and device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
    generator = generator or torch.default_generator
    return functools.partial(generator.set_state, generator.get_state())


def _draw(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def _pick(name: str, source: Source, index: int, frames: int) -> Tensor | None:
    """Chunk `index` of a whole-rollout tensor, a callable or a sequence."""
    if source is None or callable(source):
        return source(index) if callable(source) else None
    if not isinstance(source, Tensor):
        if index >= len(source):
            raise ValueError(f"{name}: got {len(source)} of them, must hold one for chunk {index} as well")
        return source[index]
    part = source[:, :, index * frames : (index + 1) * frames]
    if part.shape[2] != frames:
        raise ValueError(f"{name}: got {source.shape[2]} frames, must hold {frames} for chunk {index} as well")
    return part


def _versioned(x: Tensor) -> Tensor:
    """x, or a copy of it if it was made in inference mode: such a tensor can't tell the caches that it changed."""
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()
