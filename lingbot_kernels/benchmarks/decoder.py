"""The streaming decoder against diffusers' own, with random weights of the real size: the gate, then times in turns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from lingbot_kernels.benchmarks.gate import relative_error
from lingbot_kernels.benchmarks.rows import GREEN, RED, Row
from lingbot_kernels.benchmarks.timing import in_turns
from lingbot_kernels.components.random_parts import REAL_VAE, random_vae
from lingbot_kernels.decoding import StreamingDecoder, split

LEAST_DECIBEL = 60.0  # of the worst frame against float32, for pixels of -1 to 1
FRAMES = 3  # latent frames of a chunk
CUTS = ([1] * 5, [5], [3, 2])  # of five latent frames into calls; all must give the same bits


@dataclass(frozen=True)
class DecoderPlan:
    """What to measure.

    Attributes:
        latent_size: (H, W) of the latents.
        base_dim: of the VAE; 96 is the real one's.
        rounds: how often each variant is timed, in turns.
        ranks: also one rank's columns of a frame split among so many, where more than one.
    """

    latent_size: tuple[int, int] = (58, 104)
    base_dim: int = REAL_VAE
    rounds: int = 9
    ranks: int = 2


class EagerStream:
    """diffusers' own decoder over a stream: its loop over latent frames, its feature cache kept between calls."""

    def __init__(self, vae: Any) -> None:
        self._vae, self._begun = vae, False
        vae.clear_cache()

    def decode(self, latents: Tensor) -> Tensor:
        """Frames [N, H, W, 3] in -1 to 1 of the next latents [1, z_dim, F, H, W]."""
        vae, frames = self._vae, []
        z = vae.post_quant_conv(latents.to(vae.dtype))
        for i in range(z.shape[2]):
            vae._conv_idx = [0]
            first = {} if self._begun else {"first_chunk": True}
            frames.append(vae.decoder(z[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, **first))
            self._begun = True
        return torch.cat(frames, 2).clamp(-1, 1)[0].permute(1, 2, 3, 0)

    def nbytes(self) -> int:
        """Bytes of the feature cache."""
        return sum(x.nbytes for x in self._vae._feat_map if isinstance(x, Tensor))


def decibel(got: Tensor, want: Tensor) -> float:
    """Peak signal to noise of the worst frame, for pixels of -1 to 1."""
    errors = (got.double() - want.double()).square().mean((1, 2, 3))
    return 10 * math.log10(4 / max(float(errors.max()), 1e-30))


class DecoderBench:
    """One run of a plan on a device; `report` is given each row as soon as it is there."""

    def __init__(self, plan: DecoderPlan, device: torch.device, report: Callable[[Row], None]) -> None:
        self.plan, self.device, self.report = plan, device, report
        height, width = plan.latent_size
        self.pixels = (8 * height, 8 * width)
        self.case = f"wan-vae-{plan.base_dim}-{self.pixels[0]}x{self.pixels[1]}-{FRAMES}frames"

    @torch.no_grad()
    def run(self, vae: Any | None = None) -> bool:
        """Measure; whether the gate was green."""
        vae = vae or random_vae(self.plan.base_dim, self.device)
        low = torch.float16 if self.device.type == "cuda" else torch.float32
        decoder = StreamingDecoder.from_vae(vae, dtype=low)
        half = AutoencoderKLWan.from_config(vae.config).eval()
        torch.nn.Module.to(half, self.device, torch.bfloat16)  # diffusers' own warns that it casts
        half.load_state_dict(vae.state_dict())
        gated = self._gate(vae, decoder, half)
        if gated["gate"] != GREEN:
            self.report(self._row("lingbot_kernels", [], low, **gated))
            return False
        z = torch.randn(1, vae.config.z_dim, FRAMES, *self.plan.latent_size, device=self.device)
        eager = EagerStream(half)
        streams = {"lingbot_kernels": decoder.open(*self.plan.latent_size)}
        if self.plan.ranks > 1:
            columns = split(self.pixels[1], self.plan.ranks)[0]
            streams[f"lingbot_kernels 1/{self.plan.ranks}"] = decoder.open(*self.plan.latent_size, columns=columns)
        calls: dict[str, Callable[[], object]] = {"diffusers": lambda: eager.decode(z)}
        calls |= {name: partial(stream.decode, z) for name, stream in streams.items()}
        for call in calls.values():
            for _ in range(3):  # compiles, picks algorithms, captures graphs
                call()
        times = in_turns(calls, self.plan.rounds, self.device)
        ceiling = statistics.median(times["diffusers"])
        notes = {"diffusers": f"bfloat16, eager, feature cache {eager.nbytes() / 2**30:.3f} GiB"}
        for name, stream in streams.items():
            notes[name] = f"{gated['note']}; state {stream.nbytes() / 2**30:.3f} GiB"
        for name, taken in times.items():
            dtype = torch.bfloat16 if name == "diffusers" else low
            self.report(self._row(name, taken, dtype, ceiling, **{**gated, "note": notes[name]}))
        for stream in streams.values():
            stream.close()
        return True

    def _gate(self, vae: Any, decoder: StreamingDecoder, half: Any) -> dict[str, Any]:
        """Errors against diffusers in float32; red below 60 dB, or where the cut of the stream changes a bit."""
        z = torch.randn(1, vae.config.z_dim, sum(CUTS[0]), *self.plan.latent_size, device=self.device)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            want = EagerStream(vae).decode(z)
        vae.clear_cache()
        plain = EagerStream(half).decode(z).to(want)
        outs = []
        for cut in CUTS:
            stream = decoder.open(*self.plan.latent_size, pixels=torch.float32)
            outs.append(torch.cat([stream.decode(part) for part in z.split(cut, 2)]))
            stream.close()
        same = all(torch.equal(outs[0], out) for out in outs)
        level = decibel(outs[0], want)
        green = level >= LEAST_DECIBEL and same
        note = f"{level:.1f} dB against float32, diffusers' bfloat16 {decibel(plain, want):.1f}"
        return {
            "gate": GREEN if green else RED,
            "note": note + ("" if same else "; the cut of the stream changes bits"),
            "error": relative_error(outs[0], want),
            "plain_error": relative_error(plain, want),
        }

    def _row(
        self, backend: str, times_ms: list[float], dtype: torch.dtype, ceiling_ms: float = 0.0, **gated: Any
    ) -> Row:
        name = str(dtype).removeprefix("torch.")
        frames = 4 * FRAMES
        return Row(
            bench="end_to_end", case=self.case, op="decode_chunk", backend=backend, peer=backend == "diffusers",
            shape=(frames, *self.pixels, 3), dtype=name, tokens=FRAMES * math.prod(self.plan.latent_size),
            dim=self.plan.base_dim, bytes=3 * frames * math.prod(self.pixels), ceiling="diffusers, bfloat16, eager",
            method="events" if self.device.type == "cuda" else "clock", calls=1, precision=name, **gated,
        ).timed(times_ms, ceiling_ms)  # fmt: skip
