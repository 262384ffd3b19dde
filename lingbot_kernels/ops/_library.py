"""Registration with `torch.library`: each op has a schema that marks what it mutates, one implementation and a fake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lingbot_kernels import nvtx

LIBRARY = torch.library.Library("lingbot_kernels", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define `lingbot_kernels::<schema>` and return the overload to call.

    The implementation serves every device: which backend runs is an argument of the op, resolved by the caller.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, nvtx.ranged(name)(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lingbot_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.lingbot_kernels, name).default
