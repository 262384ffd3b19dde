"""What one stream of latents keeps while it is decoded, and its CUDA graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lingbot_kernels.decoding.columns import Columns
from lingbot_kernels.ops import frame_pixels

if TYPE_CHECKING:
    from lingbot_kernels.decoding.decoder import StreamingDecoder

PHASES = 3  # positions of the rings' three slots: what a latent frame does repeats with this period
WARM = 2  # latent frames after which every kernel of a step has run once: the first has no temporal convolutions


class DecoderStream:
    """One video, decoded as its latents come. Made by `StreamingDecoder.open`.

    On CUDA a latent frame is one replay of a CUDA graph, of which there are three, one for each position of the rings.
    Streams of one decoder share the memory of their graphs: they must be decoded on one stream of the device, or one
    after another.

    Attributes:
        height, width: of the latents.
        columns: pixel columns that come out.
        latent_frames: how many have been decoded.
    """

    def __init__(
        self, decoder: StreamingDecoder, height: int, width: int, columns: Columns, pixels: torch.dtype
    ) -> None:
        self.height, self.width, self.columns = height, width, columns
        self.latent_frames = 0
        self._decoder: StreamingDecoder | None = decoder
        self._broken = False
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        network = decoder.network
        self._rings = network.rings(height, width, columns)
        self._latent = torch.zeros(network.z_dim, height, width, dtype=network.post_quant.dtype, device=network.device)
        pixel_rows, channels = height * network.space, network.conv_out.bias.shape[0]
        shape = (network.time, pixel_rows, columns.width, channels)
        self._frames = torch.zeros(shape, dtype=pixels, device=network.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next latent frames.

        Args:
            latents: [1, z_dim, F, H, W] or [z_dim, F, H, W], on the decoder's device, of any float dtype, in the scale
                that `vae.decode` takes (not normalised).

        Returns:
            frames [N, 8 * H, columns, 3] on the device: 4 a latent frame, but 1 for the first of the stream. They are
            the caller's: later calls don't write to them.

        Raises:
            ValueError, TypeError: naming the argument, with the stream as it was.
            RuntimeError: the stream is closed, or an earlier call failed half way: `reset` begins anew.
        """
        decoder = self._ready()
        latents = self._checked(latents)
        network = decoder.network
        counts = [
            1 if n == 0 else network.time for n in range(self.latent_frames, self.latent_frames + latents.shape[1])
        ]
        frames = self._frames.new_empty(sum(counts), *self._frames.shape[1:])
        done = 0
        for latent, count in zip(latents.unbind(1), counts, strict=True):
            self._broken = True  # until all rings have moved on
            self._step(decoder, latent)
            frames[done : done + count].copy_(self._frames[:count])
            self._broken = False
            self.latent_frames += 1
            done += count
        return frames

    def reset(self) -> None:
        """Begin anew with the first latent frame; memory and graphs are kept."""
        self._ready(broken=True)
        for ring in self._rings.tensors():
            ring.zero_()
        self.latent_frames = 0
        self._broken = False

    def close(self) -> None:
        """Free the stream's memory; safe twice."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._decoder = None
        for name in ("_rings", "_latent", "_frames"):
            self.__dict__.pop(name, None)

    def graph_pool(self) -> Any:
        """The memory pool of the stream's CUDA graphs; None where it has none."""
        return next((graph.pool() for graph in self._graphs.values()), None)

    def nbytes(self) -> int:
        """Bytes that the stream keeps between calls."""
        if self._decoder is None:
            return 0
        return sum(x.nbytes for x in (*self._rings.tensors(), self._latent, self._frames))

    def _ready(self, broken: bool = False) -> StreamingDecoder:
        if self._decoder is None:
            raise RuntimeError("the stream is closed: open another")
        if self._broken and not broken:
            raise RuntimeError("an earlier call failed while it moved the stream's rings: call reset() and begin anew")
        return self._decoder

    def _checked(self, latents: Tensor) -> Tensor:
        """latents as [z_dim, F, H, W]."""
        z_dim, device = self._latent.shape[0], self._latent.device
        wanted = f"[1, {z_dim}, F, {self.height}, {self.width}] on {device}"
        if not isinstance(latents, Tensor):
            raise TypeError(f"latents: got {type(latents).__name__}, must be a tensor {wanted}")
        got = f"{latents.dtype} {list(latents.shape)} on {latents.device}"
        video = latents[0] if latents.dim() == 5 and latents.shape[0] == 1 else latents
        if video.dim() != 4 or (video.shape[0], *video.shape[2:]) != (z_dim, self.height, self.width):
            raise ValueError(f"latents: got {got}, must be {wanted}")
        if not latents.is_floating_point() or latents.device != device:
            raise TypeError(f"latents: got {got}, must be of a float dtype, {wanted}")
        return video.detach()

    def _step(self, decoder: StreamingDecoder, latent: Tensor) -> None:
        """Decode one latent frame into `_frames`."""
        n = self.latent_frames
        self._latent.copy_(latent)
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            if self._latent.device.type != "cuda" or n < WARM or torch.cuda.is_current_stream_capturing():
                self._run(decoder, n)
                return
            graph = self._graphs.get(n % PHASES)
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=decoder.graph_pool(), capture_error_mode="thread_local"):
                    self._run(decoder, n)
                self._graphs[n % PHASES] = graph
            graph.replay()

    def _run(self, decoder: StreamingDecoder, n: int) -> None:
        for i, (taps, bias) in enumerate(decoder.network.decode(self._latent, n, self._rings)):
            frame_pixels(taps, bias, self._rings.partial, self._frames[i])
