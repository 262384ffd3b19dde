"""Whether calling a module comes to its class's own forward, and to nothing else.

An op that reads a layer's weight itself takes the place of that layer's forward. It may do so for a plain layer alone:
adapters subclass or replace layers, and hooks of torch, diffusers or accelerate stand around their forward.
"""

from __future__ import annotations

from torch import nn


def untouched(module: nn.Module) -> bool:
    """Whether `module` has neither torch's forward hooks nor a patched forward.

    A forward that is its own class's, as hooks leave it behind when they are removed, is none. Hooks for all modules of
    the process (`register_module_forward_hook`) see the modules that are called, and are not looked at.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    forward = module.__dict__.get("forward")
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether `module` is of one of these classes itself, no subclass of it, and untouched."""
    return type(module) in kinds and untouched(module)
