"""Hooks around the modules of a Wan transformer: those of diffusers and accelerate, which patch a module's forward.

Such a hook keeps the forward that it found, so that changing a module's class alone would leave it with the old one.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

from diffusers.hooks.layerwise_casting import PeftInputAutocastDisableHook
from torch import nn

REGISTRY = "_diffusers_hook"


def is_served(module: nn.Module, leftovers: bool) -> bool:
    """Whether `module` has no patched forward, or one that only hooks of diffusers or accelerate patched.

    `leftovers`: a forward that is the class's own, as accelerate's hooks leave it behind, is one of theirs.
    """
    if "forward" not in module.__dict__:
        return True
    if untouched_forward(module):
        return leftovers or REGISTRY in module.__dict__
    return any(_is_own(module, owner.__dict__.get(name)) for owner, name in _slots(module))


def untouched_forward(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's forward, whatever torch's hooks see of it."""
    return "forward" not in module.__dict__ or _is_own(module, module.__dict__["forward"])


def drop_leftovers(transformer: nn.Module) -> None:
    """Take away what removed hooks left behind: forwards that are their module's own, as if patched."""
    for module in transformer.modules():
        if untouched_forward(module):
            module.__dict__.pop("forward", None)


def change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Make `module` one of class `kind`, and hooks of diffusers and accelerate around it run that class's forward."""
    found = [(owner, name) for owner, name in _slots(module) if _is_own(module, owner.__dict__.get(name))]
    module.__class__ = kind
    for owner, name in found:
        setattr(owner, name, types.MethodType(kind.forward, module))


def check_no_cache_around(transformer: Any) -> None:
    """Raise ValueError where a hook of diffusers around the whole transformer may do something else than to call it."""
    for hook, _ in _skipping(transformer):
        raise ValueError(
            f"state: got one, but transformer has {type(hook).__name__}, which skips what a causal forward must "
            "do; must be without: transformer.disable_cache() first"
        )


@contextlib.contextmanager
def without_block_caches(transformer: Any) -> Iterator[None]:
    """Within the block, hooks of diffusers that may skip a module let it run: a block that is skipped would leave the
    keys and values of another chunk behind. Its other hooks run as before.
    """
    parts = transformer.modules() if transformer._cache_config is not None else _usual_places(transformer)
    found = [reference for module in parts for _, reference in _skipping(module)]
    kept = [reference.forward for reference in found]
    try:
        for reference in found:
            reference.forward = reference.original_forward
        yield
    finally:
        for reference, forward in zip(found, kept, strict=True):
            reference.forward = forward


def check_no_offloading(transformer: nn.Module, what: str) -> None:
    """Raise ValueError where hooks move weights about: layers can't be replaced under them."""
    for name, module in transformer.named_modules():
        registry = module.__dict__.get(REGISTRY)
        if "_hf_hook" in module.__dict__ or (registry is not None and "group_offloading" in registry.hooks):
            raise ValueError(
                f"{name or 'transformer'}: has an offloading hook, which knows its layers by what they were; must have "
                f"none while {what}: remove the hooks first, and install them again afterwards"
            )


def _usual_places(transformer: Any) -> Iterator[nn.Module]:
    """Where hooks that skip stand, without a look at every layer."""
    yield from transformer.children()
    for block in transformer.blocks:
        yield block
        yield from block.children()


def _skipping(module: nn.Module) -> list[tuple[Any, Any]]:
    """(hook, its references) of each hook of diffusers around `module` that has a forward of its own."""
    registry = module.__dict__.get(REGISTRY)
    if registry is None:
        return []
    return [
        (hook, hook.fn_ref)
        for hook in registry.hooks.values()
        if hook.fn_ref.original_forward is not None and not isinstance(hook, PeftInputAutocastDisableHook)
    ]


def _slots(module: Any) -> list[tuple[Any, str]]:
    """Where hooks keep the forward that they found: (owner, attribute)."""
    registry = module.__dict__.get(REGISTRY)
    references = [] if registry is None else registry._fn_refs
    return [(module, "_old_forward"), *((r, name) for r in references for name in ("forward", "original_forward"))]


def _is_own(module: nn.Module, forward: Any) -> bool:
    """Whether `forward` is one that a class of `module` has, bound to it."""
    if not isinstance(forward, types.MethodType) or forward.__self__ is not module:
        return False
    return any(vars(kind).get("forward") is forward.__func__ for kind in type(module).__mro__)
