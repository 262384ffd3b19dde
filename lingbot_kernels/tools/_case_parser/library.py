"""Built-in names and library members of the evaluator.

What isn't modelled is unknown, harmless where its library keeps no argument.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable
from typing import Any

from .native_builtins import BUILTINS, make_exception
from .native_library import CONSTANTS, LIBRARIES, LIBRARY
from .scopes import names_read
from .statements import Statements
from .values import (
    FunctionV,
    IterV,
    Library,
    Native,
    TupleV,
    Unknown,
    Value,
)

_KEEP_NOTHING = """
    base64 csv datetime fnmatch glob hashlib json logging math numbers os pathlib platform pprint re secrets shutil
    socket string sys tempfile textwrap time typing typing_extensions uuid warnings __future__
"""
_ALWAYS_THERE = """
    abc argparse collections contextlib copy dataclasses enum functools inspect itertools operator random types unittest
"""
HARMLESS = frozenset(_KEEP_NOTHING.split())
"""Modules whose functions neither change their arguments nor give them back inside something else."""
SAFE_IMPORTS = HARMLESS - {"typing_extensions"} | frozenset(_ALWAYS_THERE.split())
"""Modules that every Python has, so that importing them doesn't raise."""


class Lib(Statements):
    """Looks up built-in names and library members."""

    def builtin(self, name: str) -> Value:
        run = BUILTINS.get(name)
        if run is not None:
            return Native(name, run)
        obj = getattr(builtins, name, None)
        if isinstance(obj, type) and issubclass(obj, BaseException):
            return Native(name, make_exception, exception=obj)
        if name in ("True", "False", "None", "NotImplemented", "__debug__"):
            return None
        if obj is not None and not name.startswith("_"):
            return Unknown(f"built-in {name} isn't evaluated", self.site(ast.Pass()), harmless=True, dotted=name)
        return None

    def library_member(self, library: Library, name: str, node: ast.AST) -> Value:
        dotted = f"{library.name}.{name}"
        if dotted in CONSTANTS:
            return CONSTANTS[dotted]
        run = LIBRARY.get(dotted)
        if run is not None:
            return Native(name, run)
        root = library.name.split(".")[0]
        return self.unknown(node, f"{dotted} isn't evaluated", harmless=root in HARMLESS, dotted=dotted)

    # -- helpers of the natives --------------------------------------------------------------------------------------

    def lazy(self, make: Callable[[], list[Value]], sources: list[Value], funcs: list[Value]) -> IterV:
        def reads() -> set[Any]:
            out: set[Any] = {id(s) for s in sources}
            for f in funcs:
                if isinstance(f, FunctionV):
                    out |= self.reached_by_names(names_read(f.node), f.env) | set(self.reach(list(sources)))
            return out

        return IterV(make, self.namespace(), reads)

    def per_item(self, items: list[Value], fn: Callable[[Value], Value]) -> list[Value]:
        """`fn` of every element, conditional where the element is."""
        out = self.list_of([])
        self.each(TupleV(items), lambda v: self.append(out, fn(v)), self.placeless)  # type: ignore[func-returns-value]
        return list(out.items)

    def pure(self, fn: Callable[..., Any], args: list[Value], node: ast.AST) -> Value:
        return self.map_pure(fn, args, node)


__all__ = ["HARMLESS", "LIBRARIES", "SAFE_IMPORTS", "Lib"]
