"""From a prompt, an image and keys to video frames: the whole world model, a chunk at a time.

`LingBotWorldPipeline.from_pretrained(folder).session(prompt, image)` begins a world; each `session.step(keys)` gives
the next chunk's frames, uint8 [12, H, W, 3] on the device, 9 the first time.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lingbot_kernels.components.folders import find_parts
from lingbot_kernels.components.image import (
    MASK_CHANNELS,
    VAE_STRIDE,
    ImageCondition,
    fitting_size,
    image_pixels,
    open_image,
)
from lingbot_kernels.components.random_parts import REAL_VAE, TINY_VAE, NoiseText, random_vae
from lingbot_kernels.components.text import TextEncoder
from lingbot_kernels.components.vae import load_vae
from lingbot_kernels.config import LingBotConfig
from lingbot_kernels.decoding import StreamingDecoder, split
from lingbot_kernels.models._inputs import Dtype, as_dtype
from lingbot_kernels.models.camera import ActionStream, CameraStream, parse_actions
from lingbot_kernels.models.checkpoint import infer_config
from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer
from lingbot_kernels.models.poses import check_poses
from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState
from lingbot_kernels.stages.causal_denoising import CausalDenoisingStage

DEFAULT_SIZE = (480, 832)
CONTEXT_ORDERS = ("after", "beside")


class LingBotWorldPipeline:
    """A transformer, the text encoder and VAE around it, and a streaming decoder: what all sessions share.

    Args:
        transformer: on the device where frames are made.
        vae: diffusers' `AutoencoderKLWan` in float32 on that device.
        text_encoder: on any device.
        stage: the sampler; the default schedule where None.
        decoder: made of the vae's weights where None.
        context: where a chunk's context update runs on CUDA, on a stream of its own: "after" the chunk's frames, or
            "beside" their decoder. The bits are the same.

    Raises:
        ValueError: the parts don't belong together, naming what differs.
    """

    def __init__(
        self,
        transformer: CausalLingBotTransformer,
        vae: Any,
        text_encoder: TextEncoder | NoiseText,
        *,
        stage: CausalDenoisingStage | None = None,
        decoder: StreamingDecoder | None = None,
        context: str = "after",
    ) -> None:
        config = transformer.config
        if context not in CONTEXT_ORDERS:
            raise ValueError(f"context: got {context!r}, must be one of {', '.join(CONTEXT_ORDERS)}")
        if vae.config.z_dim != config.out_channels:
            raise ValueError(
                f"vae: got {vae.config.z_dim} latent channels, must have the transformer's {config.out_channels}"
            )
        self.transformer, self.vae, self.text_encoder = transformer, vae, text_encoder
        self.stage = stage or CausalDenoisingStage(transformer)
        self.decoder = decoder or StreamingDecoder.from_vae(vae, device=transformer.device)
        network = self.decoder.network
        if (network.time, network.space) != (MASK_CHANNELS, VAE_STRIDE):
            raise ValueError(
                f"vae: got {network.time} frames and {network.space} pixels to a latent, must have {MASK_CHANNELS} and "
                f"{VAE_STRIDE}"
            )
        text_dim = text_encoder.model.config.d_model
        if text_dim != config.text_dim:
            raise ValueError(f"text_encoder: got {text_dim} channels, must have the transformer's {config.text_dim}")
        self.context = context

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: Dtype | None = None,
        text_device: torch.device | str | None = None,
        decoder_dtype: Dtype | None = None,
        assets: str | os.PathLike[str] | None = None,
        transformer: str | os.PathLike[str] | None = None,
        precision: Any = None,
        context: str = "after",
        **config: Any,
    ) -> LingBotWorldPipeline:
        """Read a world model from a folder in the official layout or diffusers'. Nothing is downloaded.

        Args:
            folder: with the transformer's shards, the umT5 encoder, its tokenizer and the Wan VAE; see
                `lingbot_kernels.components.folders` for the names that are looked for.
            device: the first GPU where there is one, else the CPU.
            dtype: of the transformer and the text encoder, also by name; bfloat16 on CUDA, float32 on a CPU.
            text_device: of the text encoder, which runs once a prompt; `device` where None.
            decoder_dtype: see `StreamingDecoder.from_vae`.
            assets: another folder for parts that `folder` lacks.
            transformer: folder of the transformer's shards, relative to `folder`, where it has an unusual name.
            precision: of the transformer's products, "bfloat16", "int8", "int8_qk" or an `Int8Recipe`; as the folder's
                weights are stored where None.
            context: see the class.
            config: fields of `LingBotConfig` that differ from the checkpoint's, such as `window_frames`.

        Raises:
            MissingParts: naming each part that isn't there. BadPart, CheckpointError: a part that can't be read.
            ImportError: the extra `pipeline` isn't installed.
        """
        parts = find_parts(folder, assets=assets, transformer=transformer)
        place, dtype = _place(device, dtype)
        cfg = dataclasses.replace(infer_config(parts.transformer), **config)
        # The small parts first: what is wrong with them is told before the large one is read.
        vae = load_vae(parts.vae, place)
        where = torch.device(text_device) if text_device is not None else place
        text_encoder = TextEncoder.load(parts.text_encoder, parts.tokenizer, dtype=dtype, device=where)
        decoder = StreamingDecoder.from_vae(vae, dtype=as_dtype("decoder_dtype", decoder_dtype), device=place)
        model = CausalLingBotTransformer.from_pretrained(
            parts.transformer, dtype=dtype, device=place, cfg=cfg, precision=precision
        )
        model.eval()
        return cls(model, vae, text_encoder, decoder=decoder, context=context)

    @classmethod
    def random(
        cls,
        preset: str = "tiny",
        *,
        device: torch.device | str | None = None,
        dtype: Dtype | None = None,
        context: str = "after",
        **config: Any,
    ) -> LingBotWorldPipeline:
        """A world model with random weights, without a checkpoint: it reacts to keys, and its pictures mean nothing.

        Args:
            preset: of `LingBotConfig`; "tiny" comes with a tiny VAE and runs on a laptop.
            device, dtype, context, config: as in `from_pretrained`.

        Raises:
            ImportError: the extra `pipeline` isn't installed.
        """
        place, dtype = _place(device, dtype)
        vae = random_vae(TINY_VAE if preset == "tiny" else REAL_VAE, place)
        cfg = LingBotConfig.preset(preset, **config)
        with torch.random.fork_rng([place] if place.type == "cuda" else []):
            torch.manual_seed(0)
            model = CausalLingBotTransformer(cfg, device=place, dtype=dtype).eval()
        return cls(model, vae, NoiseText(cfg.text_dim), context=context)

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def encode_prompt(self, prompt: str) -> Tensor:
        """Embeddings [1, L, text_dim] of a prompt, for the transformer.

        Raises:
            TypeError, ValueError: it is no text, says nothing, or has more tokens than the transformer takes.
        """
        found = self.text_encoder(prompt, self.transformer.config.text_len)
        return found.to(self.device, self.transformer.dtype)

    def session(
        self,
        prompt: str,
        image: Any = None,
        *,
        height: int | None = None,
        width: int | None = None,
        seed: int | None = None,
        intrinsics: Any = None,
        camera_scale: float | None = None,
        encode_ahead: bool = True,
    ) -> WorldSession:
        """A world to walk through, from its first frame.

        Args:
            prompt: what the world is.
            image: its first frame: a path, a PIL image or a uint8 array [H, W, 3], resized to the video's size by
                bicubic interpolation; no image where None.
            height, width: of the video in pixels, both or neither; by default about 480 x 832 pixels in the image's
                aspect.
            seed: of the noise; drawn where None.
            intrinsics: (fx, fy, cx, cy) of the camera for an image of 832 x 480.
            camera_scale: what translations of poses are divided by; the largest so far where None. Keys need none.
            encode_ahead: encode all that the image will ever tell before the first chunk, so that each chunk takes the
                same time; False encodes a chunk's part when it comes, which is quicker for few chunks.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        patch = self.transformer.config.patch_size[1:]
        if (height is None) != (width is None):
            raise ValueError(f"height, width: got {height} and {width}, must be given both or neither")
        picture = None if image is None else open_image(image)
        if height is None or width is None:
            height, width = (
                DEFAULT_SIZE if picture is None else fitting_size(picture.width, picture.height, (patch[0], patch[1]))
            )
        for name, pixels, step in zip(("height", "width"), (height, width), patch, strict=True):
            if not isinstance(pixels, int) or pixels < 1 or pixels % (VAE_STRIDE * step):
                raise ValueError(f"{name}: got {pixels!r}, must be a positive multiple of {VAE_STRIDE * step} pixels")
        options: dict[str, Any] = {"fit": "stretch", "device": self.device, "dtype": self.transformer.dtype}
        if intrinsics is not None:
            options["intrinsics"] = intrinsics
        steering = _Steering((height, width), options, camera_scale)
        text = self.encode_prompt(prompt)
        condition = None
        if picture is not None:
            condition = ImageCondition(
                self.vae, image_pixels(picture, height, width), latent_scale(self.vae, self.device)
            )
            if encode_ahead:
                condition.encode_all()
        return WorldSession(self, text, condition, steering, seed)


def _place(device: torch.device | str | None, dtype: Dtype | None) -> tuple[torch.device, torch.dtype]:
    """The device with its index, the first GPU where None, and the transformer's dtype on it."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    return place, as_dtype("dtype", dtype) or (torch.bfloat16 if place.type == "cuda" else torch.float32)


@dataclasses.dataclass
class _Steering:
    """Where the camera stands: by keys, by poses, or by neither yet.

    Attributes:
        options: of the `CameraStream`, but for its scale.
        scale: divisor of the translations of poses; the largest so far where None.
    """

    size: tuple[int, int]
    options: dict[str, Any]
    scale: float | None
    walk: ActionStream | None = None
    lens: CameraStream | None = None

    def __post_init__(self) -> None:
        CameraStream(*self.size, scale=self.scale, **self.options)  # refuses bad options now, not at the first chunk

    def by_keys(self, keys: str | Sequence[str], frames: int) -> tuple[_Steering, Tensor]:
        """The camera after `frames` latent frames with keys held, and the chunk's embedding."""
        held = parse_actions(keys if keys else [""])
        if len(held) not in (1, frames):
            raise ValueError(f"keys: got {len(held)} latent frames, must be one entry for the chunk or {frames}")
        if self.lens is not None and self.walk is None:
            raise ValueError("keys: got some in a session that is steered by poses, must go on with camera=poses")
        walk = copy.deepcopy(self.walk) or ActionStream()
        lens = copy.deepcopy(self.lens) or CameraStream(*self.size, scale=walk.speed, **self.options)
        poses = walk.advance(["+".join(sorted(each)) for each in held * (frames // len(held))])
        return dataclasses.replace(self, walk=walk, lens=lens), lens.advance(poses)

    def by_poses(self, poses: Any, frames: int) -> tuple[_Steering, Tensor]:
        """The camera after poses [frames, 4, 4], and the chunk's embedding."""
        array = check_poses(poses, "camera")
        if len(array) != frames:
            raise ValueError(f"camera: got {len(array)} poses, must be {frames}, one a latent frame of the chunk")
        if self.walk is not None:
            raise ValueError("camera: got poses in a session that is steered by keys, must go on with keys")
        lens = copy.deepcopy(self.lens) or CameraStream(*self.size, scale=self.scale, **self.options)
        return dataclasses.replace(self, lens=lens), lens.advance(array)


class WorldSession:
    """One world: its history, its camera, its decoder. Made by `LingBotWorldPipeline.session`; a context manager.

    A step that raises leaves the session as it was, and may be tried again, unless its frames were being decoded: the
    session is then over, which later steps say.

    Attributes:
        height, width: of the frames in pixels.
        chunks: how many have been made.
        seed: of its noise.
    """

    def __init__(
        self,
        pipeline: LingBotWorldPipeline,
        text: Tensor,
        condition: ImageCondition | None,
        steering: _Steering,
        seed: int | None,
    ) -> None:
        self.height, self.width = steering.size
        self.chunks = 0
        self._pipeline: LingBotWorldPipeline | None = pipeline
        self._text, self._condition, self._steering = text, condition, steering
        group = pipeline.transformer.shard_group
        if seed is None and group.ranks > 1:
            raise ValueError("seed: got None, must be given where ranks share a session: all draw the same noise")
        self._generator = torch.Generator(pipeline.device)
        self.seed = self._generator.seed() if seed is None else seed
        self._generator.manual_seed(self.seed)
        self._state = RealtimeCausalDiTState()
        self._pending: dict[str, Any] | None = None  # arguments of the context update that is still to come
        self._over = ""
        columns = split(self.width, group.ranks)
        self._widths = [each.width for each in columns]
        self._decoder = pipeline.decoder.open(
            self.height // VAE_STRIDE, self.width // VAE_STRIDE, columns=columns[group.rank]
        )
        self._side = torch.cuda.Stream(pipeline.device) if pipeline.device.type == "cuda" else None
        self._mean, self._std = latent_scale(pipeline.vae, pipeline.device)

    @torch.no_grad()
    def step(self, keys: str | Sequence[str] | None = None, *, camera: Any = None) -> Tensor:
        """The next chunk's frames, uint8 [12, height, width, 3]; 9 frames the first time.

        They are on the device, for work in the order of its current stream, and are handed out before the context
        update that prepares the next chunk: on CUDA that runs on a stream of its own, on a CPU at the next step, or
        when `settle` is called. Sharded, every rank is given the same arguments and gets whole frames.

        Args:
            keys: held in this chunk: "w", "w+l", "" for none; or one such entry a latent frame. w a s d move, j l turn,
                i k look up and down. No keys where None.
            camera: in place of keys: poses [F, 4, 4] camera to world, one a latent frame; or a Pluecker embedding
                [1, 384, F, height / 8, width / 8].

        Raises:
            TypeError, ValueError: naming the argument, with the session as it was. RuntimeError: it is closed or over.
        """
        pipeline = self._ready()
        config = pipeline.transformer.config
        frames = config.frames_per_chunk
        start = self.chunks * frames
        steering, embedding = self._steer(config.camera, keys, camera, frames)
        self.settle()
        before = self._generator.get_state()
        try:
            condition = None if self._condition is None else self._condition.chunk(start, frames)
            shape = (1, config.out_channels, frames, self.height // VAE_STRIDE, self.width // VAE_STRIDE)
            noise = torch.randn(shape, generator=self._generator, device=pipeline.device)
            inputs: dict[str, Any] = {"text": self._text, "condition": condition, "camera": embedding}
            latents = pipeline.stage.denoise_chunk(
                self._state, noise, generator=self._generator, update_context=False, start_frame=start, **inputs
            )
        except BaseException:
            self._generator.set_state(before)
            raise
        self._over = "a step failed while its frames were decoded: begin another session"
        self._pending = {"chunk": latents, **inputs}
        if pipeline.context == "beside":
            self._launch_context(pipeline)
        pixels = self._whole(self._decoder.decode(latents * self._std + self._mean), pipeline)
        self._launch_context(pipeline)
        self._steering, self._over = steering, ""
        self.chunks += 1
        return pixels

    def settle(self) -> None:
        """Run the context update that is still to come, if there is one, so that the next step needn't.

        On a CPU this is the time to do so: after the frames went out, while the next key is waited for.
        """
        pipeline = self._ready()
        if self._pending is not None:
            pipeline.stage.update_context(self._state, **self._pending)
            self._pending = None

    def set_prompt(self, prompt: str) -> None:
        """Go on with another prompt from the next chunk on; what was seen so far stays in the world's memory.

        Raises:
            TypeError, ValueError: as `LingBotWorldPipeline.session` says, with the session as it was.
        """
        self._text = self._ready().encode_prompt(prompt)

    def nbytes(self) -> int:
        """Bytes that the session keeps on the device between steps."""
        return self._state.nbytes() + self._decoder.nbytes()

    def close(self) -> None:
        """Free all that the session holds; safe twice."""
        self._pipeline = self._pending = self._condition = None
        self._state.dispose()
        self._decoder.close()

    def __enter__(self) -> WorldSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ready(self) -> LingBotWorldPipeline:
        if self._pipeline is None:
            raise RuntimeError("the session is closed: begin another")
        if self._over:
            raise RuntimeError(self._over)
        return self._pipeline

    def _steer(
        self, has_camera: bool, keys: str | Sequence[str] | None, camera: Any, frames: int
    ) -> tuple[_Steering, Tensor | None]:
        """The camera after the chunk and the chunk's embedding; None for a network without camera layers."""
        if keys is not None and camera is not None:
            raise ValueError("keys, camera: got both, must be one of them")
        if not has_camera:
            if camera is not None or any(parse_actions(keys if keys else [""])):
                raise ValueError("keys, camera: got some, must be None: the network has no camera layers")
            return self._steering, None
        if isinstance(camera, Tensor) and camera.dim() == 5:
            return self._steering, camera
        if camera is not None:
            return self._steering.by_poses(camera, frames)
        if self._steering.lens is not None and self._steering.walk is None and keys is None:
            raise ValueError("camera: got None, must be the chunk's poses, which steer this session")
        return self._steering.by_keys(keys if keys is not None else "", frames)

    def _launch_context(self, pipeline: LingBotWorldPipeline) -> None:
        """Start the context update on its own stream, where there are streams."""
        if self._side is not None and self._pending is not None:
            pipeline.stage.update_context(self._state, stream=self._side, **self._pending)
            self._pending = None

    def _whole(self, pixels: Tensor, pipeline: LingBotWorldPipeline) -> Tensor:
        """All columns of the frames, of which this rank decoded some."""
        if len(self._widths) == 1:
            return pixels
        widest = max(self._widths)
        mine = pixels.new_zeros(*pixels.shape[:2], widest, pixels.shape[3])
        mine[:, :, : pixels.shape[2]] = pixels
        parts = [torch.empty_like(mine) for _ in self._widths]
        dist.all_gather(parts, mine, group=pipeline.transformer.shard_group.process_group)
        return torch.cat([part[:, :, :width] for part, width in zip(parts, self._widths, strict=True)], 2)


def latent_scale(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """(mean, std) [1, z_dim, 1, 1, 1] in float32: the VAE's latents are std * normalised + mean."""
    found = (vae.config.latents_mean, vae.config.latents_std)
    mean, std = (torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1, 1) for values in found)
    return mean, std
