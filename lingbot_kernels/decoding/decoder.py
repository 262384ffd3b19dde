"""StreamingDecoder: latents of a Wan video to pixels, a few latent frames a call, as they are denoised."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from lingbot_kernels.decoding.columns import Columns
from lingbot_kernels.decoding.convolutions import FORMS
from lingbot_kernels.decoding.network import DecoderNetwork
from lingbot_kernels.decoding.stream import DecoderStream

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class StreamingDecoder:
    """The decoder of diffusers' `AutoencoderKLWan` (the Wan 2.1 family), made for streams.

    It equals `vae.decode` of the whole latent video, whatever the calls that the video is cut into, bit for bit the
    same for all of them. Each stream has its own state; the weights are shared and never change. They are copies: a
    `vae` whose weights change later needs a new decoder.

    Attributes:
        network: the layers.
        dtype, device: of weights and activations.
    """

    def __init__(self, network: DecoderNetwork) -> None:
        self.network = network
        self.dtype, self.device = network.dtype, network.device
        self._streams: weakref.WeakSet[DecoderStream] = weakref.WeakSet()

    @classmethod
    def from_vae(
        cls,
        vae: Any,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        stream_dtype: torch.dtype | None = None,
        form: str | None = None,
    ) -> StreamingDecoder:
        """Take the weights of diffusers' `AutoencoderKLWan`.

        Args:
            dtype: of weights and activations; float16 on CUDA and float32 on a CPU where not given. float16 is as fast
                as bfloat16 and eight times as exact; convolutions add up in float32, norms and sums are float32.
            device: that of the vae where not given.
            stream_dtype: of the residual stream between blocks; float32 where not given, or float64 for float64.
            form: how causal convolutions are carried out, "stacked" or "frames" (`CausalConv`); for each the faster one
                where None.

        Raises:
            TypeError, ValueError: the model isn't a Wan 2.1 decoder, or an argument is wrong; the message names it.
        """
        parameter = next(iter(_checked(vae).parameters()))
        target = torch.device(device) if device is not None else parameter.device
        dtype = dtype or (torch.float16 if target.type == "cuda" else torch.float32)
        if dtype not in DTYPES:
            raise TypeError(f"dtype: got {dtype}, must be one of float16, bfloat16, float32, float64")
        stream_dtype = stream_dtype or torch.promote_types(dtype, torch.float32)
        if form is not None and form not in FORMS:
            raise ValueError(f"form: got {form!r}, must be one of {', '.join(FORMS)}")
        return cls(DecoderNetwork(vae, dtype, target, stream_dtype, form))

    def open(
        self, height: int, width: int, *, columns: Columns | None = None, pixels: torch.dtype = torch.uint8
    ) -> DecoderStream:
        """A stream of latents of this size, from its first frame.

        Args:
            height, width: of the latents.
            columns: pixel columns to decode (`lingbot_kernels.decoding.split` gives each rank its own); all where None.
            pixels: uint8 (0 to 255) or a float dtype (-1 to 1) of the frames.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        for name, size in (("height", height), ("width", width)):
            if size < 1:
                raise ValueError(f"{name}: got {size}, must be 1 or more")
        full = width * self.network.space
        columns = columns or Columns(0, full)
        if not 0 <= columns.low < columns.high <= full:
            raise ValueError(f"columns: got {columns.low} to {columns.high}, must be within 0 to {full}, at least one")
        if pixels not in (torch.uint8, torch.float32, torch.float64):
            raise TypeError(f"pixels: got {pixels}, must be uint8, float32 or float64")
        stream = DecoderStream(self, height, width, columns, pixels)
        self._streams.add(stream)
        return stream

    def graph_pool(self) -> Any:
        """The memory pool of a CUDA graph that lives, which others may share: streams of a decoder don't run at the
        same time. None where no graph lives, as a pool dies with its last graph.
        """
        return next((pool for stream in self._streams if (pool := stream.graph_pool()) is not None), None)


def _checked(vae: Any) -> Any:
    decoder = getattr(vae, "decoder", None)
    missing = [
        name for name in ("conv_in", "mid_block", "up_blocks", "norm_out", "conv_out") if not hasattr(decoder, name)
    ]
    if missing or not hasattr(vae, "post_quant_conv"):
        raise TypeError(f"vae: got {type(vae).__name__}, must be diffusers' AutoencoderKLWan")
    config = vae.config
    if config.is_residual or config.patch_size is not None:
        raise ValueError(
            f"vae: got is_residual {config.is_residual}, patch_size {config.patch_size}, must be False and None: the "
            "decoder of Wan 2.2's 5B model has other blocks"
        )
    return vae
