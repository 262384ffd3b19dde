"""Whether a model's weights are still those that a session's caches and graphs were made with."""

from __future__ import annotations

import hashlib
import operator
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

_ADAPTER = ("merged_adapters", "_active_adapter", "_disable_adapters", "scaling")  # of PEFT's layers
_HOOKS = ("_diffusers_hook", "_hf_hook")  # of diffusers and accelerate
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_VERSION = operator.attrgetter("_version")


class WeightsIdentity:
    """A token for a module's weights, which is another one once they have changed.

    Seen are a parameter or module that was replaced, memory that was (`parameter.data = ...`), writes that torch counts
    (`load_state_dict`, `copy_`, `mul_`, also under `no_grad`), and an adapter in PEFT's manner that was merged,
    switched, scaled or turned off. Not seen are writes through `.data`, such as `parameter.data += delta`, writes to a
    parameter made in inference mode, and, where hooks of diffusers or accelerate move weights about, other memory:
    `renew` is for those.

    A call takes 0.2 us a parameter: 0.25 ms of the host for 40 layers.

    Attributes:
        hooked: whether any module had forward hooks, or a patched forward, when the token was last asked for. They
            change no weights, but a CUDA graph would not run them.
    """

    def __init__(self) -> None:
        self.hooked = False
        self.renew()

    def renew(self) -> None:
        """Have the next token be another one."""
        self._weights: list[weakref.ref[Tensor]] = []  # weak, so that replaced weights are freed at once
        self._adapters: list[weakref.ref[nn.Module]] = []
        self._moved = False
        self._seen: object = None
        self._token = object()

    def token(self, module: nn.Module) -> object:
        """The token of the weights that `module` has now."""
        weights, self.hooked = _weights_of(module)
        before = [reference() for reference in self._weights]
        same = len(before) == len(weights) and all(map(operator.is_, before, weights))
        if not same or self._look(weights) != self._seen:
            if self._seen is not None:
                self._token = object()
            self._remember(module, weights)
        return self._token

    def _remember(self, module: nn.Module, weights: list[Tensor]) -> None:
        parts = list(module.modules())
        self._weights = [weakref.ref(weight) for weight in weights]
        self._adapters = [weakref.ref(part) for part in parts if _ADAPTER[0] in part.__dict__]
        self._moved = any(hook in part.__dict__ for part in parts for hook in _HOOKS)
        self._seen = self._look(weights)

    def _look(self, weights: list[Tensor]) -> object:
        """What differs once `weights`, the tensors themselves being the same, are others."""
        adapters = [[repr(getattr(part(), name, None)) for name in _ADAPTER] for part in self._adapters]
        return _versions(weights), None if self._moved else _addresses(weights), adapters

    def __reduce__(self) -> tuple[type[WeightsIdentity], tuple[()]]:
        """A copy of a model has weights of its own."""
        return WeightsIdentity, ()


def fingerprint(module: nn.Module) -> str:
    """What stands for the values of a module's parameters, on any device and in any process: a digest of the sums of
    each one's bits, taken as integers on the device, exact in any order of addition.
    """
    sums = [
        parameter.detach().view(_INTEGERS[parameter.element_size()]).sum(dtype=torch.int64).cpu()
        for parameter in module.parameters()
    ]
    return hashlib.blake2b(torch.stack(sums).numpy().tobytes(), digest_size=16).hexdigest()


def _weights_of(module: nn.Module) -> tuple[list[Tensor], bool]:
    """Every parameter, where it stands, as `module.parameters()` would give it in eight times as long; and whether a
    module has forward hooks or a patched forward.
    """
    modules: list[nn.Module] = [module]
    found: list[Tensor] = []
    hooked = False
    while modules:
        attributes = modules.pop().__dict__
        if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"] or "forward" in attributes:
            hooked = True
        if weights := attributes["_parameters"]:
            found += weights.values()
        if parts := attributes["_modules"]:
            modules += parts.values()
    return [weight for weight in found if weight is not None], hooked


def _addresses(weights: list[Tensor]) -> list[int]:
    try:
        return list(map(Tensor.data_ptr, weights))
    except RuntimeError:  # of a subclass that wraps other tensors
        return [_or_unknown(Tensor.data_ptr, weight) for weight in weights]


def _versions(weights: list[Tensor]) -> list[int]:
    try:
        return list(map(_VERSION, weights))
    except RuntimeError:  # of a parameter made in inference mode
        return [_or_unknown(_VERSION, weight) for weight in weights]


def _or_unknown(read: Callable[[Tensor], int], weight: Tensor) -> int:
    try:
        return read(weight)
    except RuntimeError:
        return -1
