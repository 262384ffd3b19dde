"""From latents to pixels: a streaming decoder made from the weights of diffusers' `AutoencoderKLWan`."""

from lingbot_kernels.decoding.columns import Columns, split
from lingbot_kernels.decoding.decoder import StreamingDecoder
from lingbot_kernels.decoding.stream import DecoderStream

__all__ = ["Columns", "DecoderStream", "StreamingDecoder", "split"]
