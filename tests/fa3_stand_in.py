"""What stands in for fa3-fwd: its function's arguments, in plain torch, for CPUs too."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from lingbot_kernels import reference
from lingbot_kernels.ops import windowed_attention

MODULE = "fa3_fwd_interface"


class Calls(list[dict[str, Any]]):
    """The keyword arguments of each call, with "shapes" of q, k and v."""


def install(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False, *,
        q_descale: Tensor | None = None, k_descale: Tensor | None = None, v_descale: Tensor | None = None,
        return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        calls.append({
            "softmax_scale": softmax_scale, "causal": causal, "return_attn_probs": return_attn_probs,
            "shapes": [x.shape for x in (q, k, v)], "dtype": q.dtype,
            "descales": [None if x is None else (x.shape, x.dtype) for x in (q_descale, k_descale, v_descale)],
        })  # fmt: skip
        assert all(x.stride(-1) == 1 and x.dtype == q.dtype for x in (q, k, v))
        wide = [x.float() if x.itemsize < 4 else x for x in (q, k, v)]
        for i, scale in enumerate((q_descale, k_descale, v_descale)):
            wide[i] = wide[i] if scale is None else wide[i] * scale[:, None, :, None]
        out, lse = reference.windowed_attention_with_lse(*wide, k.shape[1])
        result = out.unflatten(-1, q.shape[2:]).to(torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype)
        return (result, lse) if return_attn_probs else result

    module = types.ModuleType(MODULE)
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, module)
    forget()
    return calls


def forget() -> None:
    """What was found out of installed libraries is asked again."""
    module = sys.modules[windowed_attention.__module__]
    module._fa3_missing.cache_clear()
    module.resolve_library.cache_clear()
