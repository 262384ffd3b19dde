"""Signs, and a layer with int8 weights against the layer it was made of."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lingbot_kernels import ops
from lingbot_kernels.quantization import PLAIN, Int8Linear, QuantizedRows, random_signs, rows_for


def test_signs_are_fixed_for_ever() -> None:
    """Checkpoints name nothing but a seed: these bits must never change. SplitMix64's first outputs for seed 0."""
    signs = random_signs(128, 0).tolist()
    words = [sum(1 << bit for bit in range(64) if signs[64 * i + bit] == -1) for i in range(2)]
    assert words == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_signs_fill_the_block_and_balance() -> None:
    signs = random_signs(5000, 3)
    assert signs.shape == (5120,) and signs.dtype == torch.int8 and signs.abs().eq(1).all()
    assert abs(int(signs.sum())) < 4 * 5120**0.5
    assert torch.equal(random_signs(200, 3), signs[:256]) and not torch.equal(random_signs(200, 4), signs[:256])
    signs.zero_()
    assert random_signs(5000, 3).abs().eq(1).all()  # what is handed out is a copy


def make_layer(
    inputs: int, outputs: int, rotate: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[nn.Linear, Int8Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, dtype=dtype)
    layer = Int8Linear(inputs, outputs, rotate=rotate, seed=5, dtype=dtype)
    layer.fill(plain.weight)
    with torch.no_grad():
        layer.bias.copy_(plain.bias)
    return plain, layer


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 20), (128, 128), (200, 7), (1, 3)])
def test_the_layer_is_near_the_one_it_was_made_of(inputs: int, outputs: int, rotate: bool) -> None:
    plain, layer = make_layer(inputs, outputs, rotate)
    x = torch.randn(2, 5, inputs)
    want, got = plain(x), layer(x)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).norm() <= 0.02 * (want - plain.bias).norm()
    step = layer.weight_scale.max()
    assert (layer.dequantized() - plain.weight).abs().max() <= (step if not rotate else 4 * step)
    activated = layer(x, "gelu_tanh")
    torch.testing.assert_close(activated, F.gelu(got, approximate="tanh"), rtol=1e-5, atol=1e-6)


def test_codes_from_a_pass_are_those_that_the_layer_makes() -> None:
    _, layer = make_layer(200, 32)
    x, shift, scale = torch.randn(2, 5, 200), torch.randn(200), torch.randn(200)
    rows = rows_for(layer)
    taken = rows.layer_norm_modulate(x, shift, scale, 1e-6, x.dtype)
    assert isinstance(taken, QuantizedRows)
    y = ops.layer_norm_modulate(x, shift, scale, 1e-6)
    apart = (taken.codes.int() - layer.rows.quantize(y).codes.int()).abs()
    assert apart.max() <= 1 and apart.float().mean() <= 1e-3
    torch.testing.assert_close(layer(taken), layer(y), rtol=0.02, atol=0.02)
    assert rows_for(nn.Linear(4, 4)) is PLAIN


def test_one_loud_channel_costs_a_rotated_layer_little() -> None:
    errors = {}
    for rotate in (True, False):
        plain, layer = make_layer(512, 64, rotate)
        x = torch.randn(1, 50, 512)
        x[..., 7] *= 60
        with torch.no_grad():
            errors[rotate] = float((layer(x) - plain(x)).norm() / plain(x).norm())
    assert errors[True] < 0.03 and 4 * errors[True] < errors[False]


def test_scales_stay_float32_when_a_model_is_cast() -> None:
    _, layer = make_layer(64, 8)
    scale, codes = layer.weight_scale.clone(), layer.weight.clone()
    for module in (layer.bfloat16(), copy.deepcopy(layer), layer.to("cpu", torch.float32)):
        assert module.weight_scale.dtype == torch.float32 and torch.equal(module.weight_scale, scale)
        assert torch.equal(module.weight, codes) and torch.equal(module.signs, random_signs(64, 5))
    assert layer.bias.dtype == torch.float32 and not layer.weight.requires_grad


def test_a_layer_on_the_meta_device_gets_its_signs_with_its_memory() -> None:
    with torch.device("meta"):
        layer = Int8Linear(200, 8, seed=5)
    assert layer.weight.is_meta and layer.signs is not None and layer.signs.is_meta
    layer.to_empty(device="cpu")
    assert torch.equal(layer.signs, random_signs(200, 5))
    _, filled = make_layer(200, 8)
    layer.load_state_dict(filled.state_dict())
    x = torch.randn(1, 3, 200)
    assert torch.equal(layer(x), filled(x))
    assert set(layer.state_dict()) == {"weight", "weight_scale", "bias"}


def test_what_cannot_be_quantised_is_named() -> None:
    _, layer = make_layer(64, 8)
    with pytest.raises(ValueError, match="weight: got a NaN or Inf, must be finite to be quantised"):
        layer.fill(torch.full((8, 64), float("inf")))
    with pytest.raises(ValueError, match="in_features: got 131072, must be at most 131071"):
        Int8Linear(131072, 1)


def test_the_repr_says_what_a_layer_does() -> None:
    assert repr(make_layer(64, 8)[1]) == "Int8Linear(in_features=64, out_features=8, int8, rotated (seed 5))"
    assert "not rotated" in repr(make_layer(64, 8, rotate=False)[1])
