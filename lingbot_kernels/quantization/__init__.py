"""Eight-bit weights and activations: which products, by which rotation, and the layers that compute them."""

from lingbot_kernels.quantization.linear import Int8Linear, rows_for
from lingbot_kernels.quantization.recipe import ATTENTIONS, PRECISIONS, PRODUCTS, Int8Recipe, product_shapes, recipe_of
from lingbot_kernels.quantization.rotation import random_signs
from lingbot_kernels.quantization.rows import PLAIN, Int8Rows, QuantizedRows, Rows, Taken

__all__ = [
    "ATTENTIONS",
    "PLAIN",
    "PRECISIONS",
    "PRODUCTS",
    "Int8Linear",
    "Int8Recipe",
    "Int8Rows",
    "QuantizedRows",
    "Rows",
    "Taken",
    "product_shapes",
    "random_signs",
    "recipe_of",
    "rows_for",
]
