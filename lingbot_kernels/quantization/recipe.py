"""What of a network is computed in eight bits."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from lingbot_kernels.config import LingBotConfig

# A block's products, by the name that a recipe gives them; "camera" stands for the four layers of the camera.
PRODUCTS = ("qkv", "self_o", "cross_q", "cross_o", "ffn_up", "ffn_down", "camera")
ATTENTIONS = ("bfloat16", "int8_qk")
PRECISIONS = ("bfloat16", "int8", "int8_qk")
FORMAT = "int8-hadamard128"  # how weights are stored; another rotation or layout has another name
LARGEST_SEED = 2**63 - 1
_LEFT_OUT = re.compile(r"blocks\.(0|[1-9]\d*)(?:\.(\w+))?")


@dataclass(frozen=True, repr=False)
class Int8Recipe:
    """Which products of the blocks run on int8 rows and int8 weights, and how both are rotated before. Hashable.

    Text, time and patch embeddings, the text's K and V, the head and every modulation stay as they are.

    Args:
        products: of PRODUCTS. The default leaves the camera's four as they are: they scale the residual stream itself,
            and are computed once per chunk.
        leave_out: blocks, or single products of them, that stay as they are: "blocks.0", "blocks.39.ffn_down".
        attention: of every block's self-attention, "bfloat16", or "int8_qk": Q and K in int8, V as it is.
        rotate: times random signs, then times a Hadamard matrix in blocks of 128 channels: what one loud channel has
            is spread over its block. False is for comparison.
        seed: of the signs.

    Raises:
        ValueError, TypeError: naming the field, its value and what it must be.
    """

    products: tuple[str, ...] = PRODUCTS[:-1]
    leave_out: tuple[str, ...] = ()
    attention: str = "bfloat16"
    rotate: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("products", "leave_out"):
            values = getattr(self, name)
            if isinstance(values, str) or not all(isinstance(value, str) for value in values):
                raise TypeError(f"Int8Recipe.{name}: got {values!r}, must be a sequence of names")
            object.__setattr__(self, name, tuple(values))
        unknown = [name for name in self.products if name not in PRODUCTS]
        if unknown:
            raise ValueError(f"Int8Recipe.products: got {unknown[0]!r}, must be of {', '.join(PRODUCTS)}")
        # In the order of the table: recipes that do the same are equal.
        object.__setattr__(self, "products", tuple(name for name in PRODUCTS if name in self.products))
        for entry in self.leave_out:
            match = _LEFT_OUT.fullmatch(entry)
            if match is None or match[2] not in (None, *PRODUCTS):
                raise ValueError(
                    f"Int8Recipe.leave_out: got {entry!r}, must be 'blocks.<index>' or 'blocks.<index>.<product>', the "
                    f"product of {', '.join(PRODUCTS)}"
                )
        object.__setattr__(self, "leave_out", tuple(sorted(set(self.leave_out), key=_order)))
        if self.attention not in ATTENTIONS:
            raise ValueError(
                f"Int8Recipe.attention: got {self.attention!r}, must be {' or '.join(map(repr, ATTENTIONS))}"
            )
        if not isinstance(self.rotate, bool):
            raise TypeError(f"Int8Recipe.rotate: got {self.rotate!r}, must be True or False")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"Int8Recipe.seed: got {self.seed!r}, must be an integer from 0 to {LARGEST_SEED}")

    @property
    def precision(self) -> str:
        """The name that rows of the benches give it: "int8", or "int8_qk" with attention in it."""
        return "int8_qk" if self.attention == "int8_qk" else "int8"

    def __repr__(self) -> str:
        """What differs from the default recipe."""
        fields = ((field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self))
        return f"Int8Recipe({', '.join(f'{name}={value!r}' for name, value, usual in fields if value != usual)})"

    def has(self, block: int, product: str) -> bool:
        """Whether this product of this block runs in int8."""
        left_out = (f"blocks.{block}", f"blocks.{block}.{product}")
        return product in self.products and not any(name in self.leave_out for name in left_out)

    def check(self, num_layers: int, camera: bool) -> None:
        """Raise ValueError where the recipe names what a network of `num_layers` blocks has not."""
        for entry in self.leave_out:
            match = _LEFT_OUT.fullmatch(entry)
            assert match is not None
            if int(match[1]) >= num_layers:
                raise ValueError(
                    f"Int8Recipe.leave_out: got {entry!r}, must name one of the network's {num_layers} blocks, "
                    f"blocks.0 to blocks.{num_layers - 1}"
                )
            if match[2] == "camera" and not camera:
                raise ValueError(f"Int8Recipe.leave_out: got {entry!r}, but the network has no camera layers")
        if "camera" in self.products and not camera:
            raise ValueError("Int8Recipe.products: got 'camera', but the network has no camera layers")

    def to_dict(self) -> dict[str, Any]:
        """All fields and the format, in values that JSON can hold; `from_dict` reads them back."""
        fields = dataclasses.asdict(self)
        return {"format": FORMAT, **{name: list(x) if isinstance(x, tuple) else x for name, x in fields.items()}}

    @classmethod
    def from_dict(cls, fields: Any) -> Int8Recipe:
        """The inverse of `to_dict`.

        Raises:
            ValueError, TypeError: another format, unknown or missing fields, or a field out of range.
        """
        if not isinstance(fields, dict) or "format" not in fields:
            raise ValueError(f"quantization: got {fields!r}, must be an object with a format")
        if fields["format"] != FORMAT:
            raise ValueError(f"quantization.format: got {fields['format']!r}, must be {FORMAT!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        odd = {*fields} ^ {"format", *known}
        if odd:
            raise ValueError(
                f"quantization: unknown or missing fields {', '.join(sorted(odd))}; it has {', '.join(known)}"
            )
        return cls(**{name: fields[name] for name in known})


def product_shapes(cfg: LingBotConfig) -> dict[str, tuple[tuple[int, int], ...]]:
    """(N, K) of a block's products: the weights [N, K] that each name of PRODUCTS stands for."""
    d, f = cfg.dim, cfg.ffn_dim
    square = ((d, d),)
    return {
        "qkv": ((3 * d, d),), "self_o": square, "cross_q": square, "cross_o": square, "ffn_up": ((f, d),),
        "ffn_down": ((d, f),), "camera": 4 * square if cfg.camera else (),
    }  # fmt: skip


def _order(entry: str) -> tuple[int, str]:
    match = _LEFT_OUT.fullmatch(entry)
    assert match is not None
    return int(match[1]), match[2] or ""


def recipe_of(precision: str | Int8Recipe) -> Int8Recipe | None:
    """The recipe of a precision: None for "bfloat16", the default one for "int8", with attention in it for "int8_qk".

    Raises:
        ValueError: neither a name of PRECISIONS nor a recipe.
    """
    if isinstance(precision, Int8Recipe):
        return precision
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, must be {', '.join(map(repr, PRECISIONS))} or an Int8Recipe")
    if precision == "bfloat16":
        return None
    return Int8Recipe(attention="int8_qk" if precision == "int8_qk" else "bfloat16")
