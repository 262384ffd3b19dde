"""Kernels and the realtime model of the causal video DiT LingBot-World.

Names are imported on first use, so that `import lingbot_kernels` (and its standard-library tools) needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lingbot_kernels._version import __version__

if TYPE_CHECKING:
    from lingbot_kernels.config import LingBotConfig
    from lingbot_kernels.models.lingbot_world import CausalLingBotTransformer
    from lingbot_kernels.ops import RingPosition, use_backend
    from lingbot_kernels.pipeline import LingBotWorldPipeline
    from lingbot_kernels.quantization import Int8Recipe
    from lingbot_kernels.realtime.causal_state import RealtimeCausalDiTState
    from lingbot_kernels.stages.causal_denoising import CausalDenoisingStage

_HOMES = {
    "LingBotConfig": "lingbot_kernels.config",
    "CausalLingBotTransformer": "lingbot_kernels.models.lingbot_world",
    "RealtimeCausalDiTState": "lingbot_kernels.realtime.causal_state",
    "CausalDenoisingStage": "lingbot_kernels.stages.causal_denoising",
    "LingBotWorldPipeline": "lingbot_kernels.pipeline",
    "Int8Recipe": "lingbot_kernels.quantization",
    "RingPosition": "lingbot_kernels.ops",
    "use_backend": "lingbot_kernels.ops",
}

__all__ = [
    "CausalDenoisingStage",
    "CausalLingBotTransformer",
    "Int8Recipe",
    "LingBotConfig",
    "LingBotWorldPipeline",
    "RealtimeCausalDiTState",
    "RingPosition",
    "__version__",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))
