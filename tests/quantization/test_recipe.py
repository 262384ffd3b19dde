"""Recipes: what they mean, what they refuse, and that files can hold them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lingbot_kernels import Int8Recipe, LingBotConfig
from lingbot_kernels.quantization import PRODUCTS, product_shapes, recipe_of


def test_the_default_leaves_the_camera_and_attention() -> None:
    recipe = Int8Recipe()
    assert recipe.products == ("qkv", "self_o", "cross_q", "cross_o", "ffn_up", "ffn_down")
    assert (recipe.attention, recipe.rotate, recipe.precision) == ("bfloat16", True, "int8")
    assert Int8Recipe(attention="int8_qk").precision == "int8_qk"
    assert not recipe.has(0, "camera") and Int8Recipe(products=PRODUCTS).has(0, "camera")


def test_blocks_and_products_can_be_left_out() -> None:
    recipe = Int8Recipe(leave_out=("blocks.3", "blocks.10.ffn_down"))
    left_out = [(block, name) for block in range(12) for name in recipe.products if not recipe.has(block, name)]
    assert left_out == [*((3, name) for name in recipe.products), (10, "ffn_down")]


def test_recipes_that_do_the_same_are_equal_and_say_what_is_unusual() -> None:
    one = Int8Recipe(products=("ffn_up", "qkv"), leave_out=("blocks.10", "blocks.9", "blocks.9"))
    other = Int8Recipe(products=["qkv", "ffn_up"], leave_out=["blocks.9", "blocks.10"])  # type: ignore[arg-type]
    assert one == other and hash(one) == hash(other)
    assert repr(one) == "Int8Recipe(products=('qkv', 'ffn_up'), leave_out=('blocks.9', 'blocks.10'))"
    assert repr(Int8Recipe()) == "Int8Recipe()"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"products": ("qkv", "head")}, "Int8Recipe.products: got 'head', must be of qkv, "),
        ({"products": "qkv"}, "Int8Recipe.products: got 'qkv', must be a sequence of names"),
        ({"leave_out": ("blocks",)}, "Int8Recipe.leave_out: got 'blocks', must be 'blocks.<index>'"),
        ({"leave_out": ("blocks.01",)}, "Int8Recipe.leave_out: got 'blocks.01'"),
        ({"leave_out": ("blocks.1.head",)}, "Int8Recipe.leave_out: got 'blocks.1.head'"),
        ({"leave_out": (3,)}, r"Int8Recipe.leave_out: got \(3,\), must be a sequence of names"),
        ({"attention": "fp8"}, "Int8Recipe.attention: got 'fp8', must be 'bfloat16' or 'int8_qk'"),
        ({"rotate": 1}, "Int8Recipe.rotate: got 1, must be True or False"),
        ({"seed": -1}, "Int8Recipe.seed: got -1, must be an integer from 0"),
        ({"seed": True}, "Int8Recipe.seed: got True"),
        ({"seed": 2**63}, "Int8Recipe.seed: got 9223372036854775808"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Int8Recipe(**fields)


def test_what_a_network_has_not_is_named() -> None:
    Int8Recipe(leave_out=("blocks.3",)).check(4, camera=False)
    with pytest.raises(
        ValueError, match=r"got 'blocks.4', must name one of the network's 4 blocks, blocks.0 to blocks.3"
    ):
        Int8Recipe(leave_out=("blocks.4",)).check(4, camera=True)
    for recipe in (Int8Recipe(products=PRODUCTS), Int8Recipe(leave_out=("blocks.0.camera",))):
        with pytest.raises(ValueError, match="the network has no camera layers"):
            recipe.check(4, camera=False)


def test_json_holds_a_recipe() -> None:
    recipe = Int8Recipe(products=("qkv", "camera"), leave_out=("blocks.2.qkv",), rotate=False, seed=7)
    assert Int8Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "int4"}, "quantization.format: got 'int4', must be 'int8-hadamard128'"),
        ({"bits": 4}, "quantization: unknown or missing fields bits"),
        ({"seed": None}, "Int8Recipe.seed: got None"),
    ],
)
def test_other_formats_and_fields_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int8Recipe.from_dict({**Int8Recipe().to_dict(), **change})


def test_missing_fields_and_other_things_are_refused() -> None:
    fields = Int8Recipe().to_dict()
    del fields["rotate"]
    with pytest.raises(ValueError, match="unknown or missing fields rotate"):
        Int8Recipe.from_dict(fields)
    for content in ({}, [], "int8", None):
        with pytest.raises(ValueError, match="must be an object with a format"):
            Int8Recipe.from_dict(content)


def test_precisions_by_name() -> None:
    assert recipe_of("bfloat16") is None and recipe_of("int8") == Int8Recipe()
    assert recipe_of("int8_qk") == Int8Recipe(attention="int8_qk")
    own = Int8Recipe(seed=3)
    assert recipe_of(own) is own
    with pytest.raises(
        ValueError, match="precision: got 'fp8', must be 'bfloat16', 'int8', 'int8_qk' or an Int8Recipe"
    ):
        recipe_of("fp8")


def test_product_shapes_are_those_of_the_networks_weights() -> None:
    cfg = LingBotConfig.preset("tiny")
    shapes = product_shapes(cfg)
    assert tuple(shapes) == PRODUCTS
    assert shapes["qkv"] == ((384, 128),) and shapes["ffn_down"] == ((128, 256),) and len(shapes["camera"]) == 4
    assert product_shapes(LingBotConfig.preset("tiny", camera=False))["camera"] == ()
