"""A dtype may be given by its name, wherever a model is made; what names none is refused under the argument's name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lingbot_kernels import CausalLingBotTransformer, LingBotConfig
from lingbot_kernels.models._inputs import as_dtype
from lingbot_kernels.models.checkpoint import load_checkpoint

NAMES = {
    torch.bfloat16: ("bfloat16", "bf16", "torch.bfloat16", "BF16", " bfloat16 "),
    torch.float16: ("float16", "fp16", "half", "torch.half"),
    torch.float32: ("float32", "fp32", "float", "torch.float32"),
    torch.float64: ("float64", "fp64", "double", "torch.double"),
}
REFUSED = [
    ("bfloat", ValueError),
    ("", ValueError),
    ("auto", ValueError),
    ("int8", ValueError),
    ("torch.int32", ValueError),
    ("float8_e4m3fn", ValueError),
    (torch.int8, ValueError),
    (torch.float8_e4m3fn, ValueError),
    (torch.complex64, ValueError),
    (np.float32, TypeError),
    (np.dtype("float32"), TypeError),
    (16, TypeError),
    (True, TypeError),
    (b"bfloat16", TypeError),
    ("x" * 1000, ValueError),
]


@pytest.mark.parametrize(("dtype", "name"), [(dtype, name) for dtype, names in NAMES.items() for name in names])
def test_a_name_is_its_dtype(dtype, name):
    assert as_dtype("dtype", name) is dtype and as_dtype("dtype", dtype) is dtype


def test_models_are_made_by_name(tmp_path):
    cfg = LingBotConfig.preset("tiny", num_layers=1)
    model = CausalLingBotTransformer(cfg, dtype="bf16")
    assert model.dtype is torch.bfloat16
    model.save_pretrained(tmp_path)
    assert CausalLingBotTransformer.from_pretrained(tmp_path, dtype="torch.float32").dtype is torch.float32
    assert CausalLingBotTransformer.from_pretrained(tmp_path).dtype is torch.bfloat16
    load_checkpoint(model, tmp_path, dtype="double")
    assert model.dtype is torch.float64


@pytest.mark.parametrize(("value", "kind"), REFUSED, ids=[str(value)[:20] for value, _ in REFUSED])
def test_what_names_no_dtype_is_refused_where_it_is_passed(value, kind, tmp_path):
    cfg = LingBotConfig.preset("tiny", num_layers=1)
    model = CausalLingBotTransformer(cfg)
    for call in (
        lambda: CausalLingBotTransformer(cfg, dtype=value),
        lambda: CausalLingBotTransformer.from_pretrained(tmp_path / "none", dtype=value),
        lambda: load_checkpoint(model, tmp_path / "none", dtype=value),
    ):
        with pytest.raises(kind, match=r"^dtype: got .*, must be bfloat16, float16, float32 or float64") as refused:
            call()
        assert len(str(refused.value)) < 250
        assert ("precision='int8'" in str(refused.value)) == ("int8" in str(value))


@given(st.text(max_size=12))
def test_any_text_is_a_dtype_or_refused(text):
    try:
        assert as_dtype("dtype", text) in NAMES
    except ValueError as refused:
        assert str(refused).startswith("dtype: got ")
