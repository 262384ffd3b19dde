"""Values of the static evaluator: what a name, a list element or an expression may stand for.

Scalars are Python's own; containers, functions, classes and instances are the classes below, with Python's identity.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .conditions import Cond

Value = Any

SCALARS = frozenset({str, int, float, bool, type(None), bytes, complex, type(Ellipsis)})


class _Absent:
    """A name or key that isn't bound."""

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()

LEFT = "<left>"  # not an identifier: apart from every name of the source


@dataclass(frozen=True)
class Site:
    """A place in a source file: the module it is in and the node there."""

    module: Module
    node: ast.AST


class Cell:
    """An object that can change; `birth` tells whether it is older than an open branch."""

    __slots__ = ("birth",)

    def __init__(self, birth: int) -> None:
        self.birth = birth


class Namespace(Cell):
    """Names and values: a module's, a function call's, a class's or an instance's."""

    __slots__ = ("vars",)

    def __init__(self, birth: int, values: dict[str, Value] | None = None) -> None:
        super().__init__(birth)
        self.vars: dict[str, Value] = {} if values is None else values


class ListV(Cell):
    """A list. Elements are values, `Maybe` (present under a condition) or `Opaque` (unknown elements)."""

    __slots__ = ("items", "version")

    def __init__(self, birth: int, items: list[Value]) -> None:
        super().__init__(birth)
        self.items = items
        self.version = 0


class DictV(Cell):
    """A dict: hashable key -> (key, value). `opaque` holds why it may have other entries, if so."""

    __slots__ = ("entries", "opaque")

    def __init__(self, birth: int, entries: dict[Any, tuple[Value, Value]], opaque: Opaque | None = None) -> None:
        super().__init__(birth)
        self.entries = entries
        self.opaque = opaque


class SetV(DictV):
    """A set: like `DictV`, every value being True."""

    __slots__ = ()


class TupleV:
    """A tuple or range; same elements as `ListV`, never changed."""

    __slots__ = ("items",)

    def __init__(self, items: list[Value]) -> None:
        self.items = items


@dataclass(frozen=True)
class Maybe:
    """A list element that is there when `cond` holds."""

    cond: Cond
    value: Value


@dataclass(frozen=True, eq=False)
class Opaque:
    """Any number of unknown elements, or unknown changes, of a container; `site` and `reason` say why."""

    reason: str
    site: Site


@dataclass(frozen=True, eq=False)
class Choice:
    """One of several values, by mutually exclusive conditions."""

    alts: list[tuple[Cond, Value]]


class Unknown:
    """A value that can't be resolved, with the place and the reason.

    `harmless`: a function of a library known not to change its arguments. `dotted`: its import path, where known.
    `old`: the lists an unresolved call was given. `added`: what was appended to it later.
    """

    __slots__ = ("added", "atom", "dotted", "harmless", "old", "reason", "site")

    def __init__(self, reason: str, site: Site, *, harmless: bool = False, dotted: str = "") -> None:
        self.reason = reason
        self.site = site
        self.harmless = harmless
        self.dotted = dotted
        self.atom: Cond | None = None
        self.old: list[Value] = []
        self.added: ListV | None = None


class Module:
    """A source file and its globals."""

    def __init__(self, path: str, name: str, lines: list[str], ns: Namespace) -> None:
        self.path = path
        self.name = name
        self.lines = lines
        self.ns = ns
        self.postponed_annotations = False


@dataclass(frozen=True, eq=False)
class Library:
    """A standard-library module that the evaluator models in part."""

    name: str


@dataclass(eq=False)
class Env:
    """A scope: `kind` is module, function, class or comprehension."""

    kind: str
    ns: Namespace
    parent: Env | None
    module: Module
    local: frozenset[str] = frozenset()
    global_names: frozenset[str] = frozenset()
    nonlocal_names: frozenset[str] = frozenset()
    cls: ClassV | None = None
    first_arg: Value = None


@dataclass(eq=False)
class FunctionV:
    """A function or lambda of the source, with its closure."""

    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    env: Env
    name: str
    defaults: list[Value]
    kw_defaults: dict[str, Value]
    attrs: Namespace
    generator: bool = False
    owner: ClassV | None = None
    memo: dict[Any, Value] | None = None


@dataclass(eq=False)
class Bound:
    """A function of the source bound to its first argument."""

    func: Value
    first: Value


@dataclass(eq=False)
class Method:
    """A method of a built-in value."""

    owner: Value
    name: str


@dataclass(eq=False)
class Native:
    """A built-in or modelled library function: `run(evaluator, args, kwargs, node)`."""

    name: str
    run: Callable[..., Value]
    exception: type[BaseException] | None = None


@dataclass(eq=False)
class Partial:
    """functools.partial."""

    func: Value
    args: list[Value]
    kwargs: dict[str, Value]


@dataclass(eq=False)
class Wrapped:
    """property, staticmethod or classmethod around a function."""

    kind: str
    func: Value


@dataclass(eq=False)
class Super:
    """super() inside a method."""

    cls: ClassV
    first: Value


class ClassV:
    """A class. `opaque`: its bases, metaclass or decorators aren't all known. `case`: it makes test cases."""

    def __init__(self, name: str, bases: list[ClassV], ns: Namespace, *, opaque: bool, case: bool) -> None:
        self.name = name
        self.bases = bases
        self.ns = ns
        self.opaque = opaque
        self.case = case
        self.kind = "plain"  # or dataclass, enum, namedtuple, exception
        self.frozen = False
        self.eq = True
        self.fields: list[Field] = []
        self.members: list[Value] = []
        self.mixin: type | None = None
        self.base_exception: type[BaseException] = Exception

    def mro(self) -> list[ClassV]:
        """Depth-first base order, each class once (exact for the single inheritance that configs use)."""
        out: list[ClassV] = []
        for cls in [self, *(c for base in self.bases for c in base.mro())]:
            if cls in out:
                out.remove(cls)
            out.append(cls)
        return out


@dataclass
class Field:
    """A dataclass field: `default` is ABSENT, a value, or made by calling `factory`."""

    name: str
    default: Value = ABSENT
    factory: Value = ABSENT
    kw_only: bool = False
    init: bool = True


class Instance:
    """An object of a class of the source, or a case. `site`: where it was made; `line`: of the config's own code."""

    __slots__ = ("cls", "line", "ns", "positional", "site", "taint")

    def __init__(self, cls: ClassV, ns: Namespace, site: Site, line: int) -> None:
        self.cls = cls
        self.ns = ns
        self.site = site
        self.line = line
        self.positional: list[Value] = []
        self.taint: Opaque | None = None


@dataclass(eq=False)
class EnumMember:
    """A member of an enumeration."""

    cls: ClassV
    name: str
    value: Value


@dataclass(eq=False)
class IterV:
    """An iterator. `LEFT` in `ns` is ABSENT until `make` has run, then the list of elements not yet taken.

    `reads`: the objects and names that `make` may look at, for loops that change them meanwhile.
    """

    make: Callable[[], list[Value]]
    ns: Namespace
    reads: Callable[[], set[Any]] | None = None


class PyRaise(Exception):
    """The evaluated code raises for certain; `kind` is the exception class (None: unknown), `value` its instance."""

    def __init__(self, kind: type[BaseException] | ClassV | None, node: ast.AST | None, text: str = "") -> None:
        super().__init__(text)
        self.kind = kind
        self.node = node
        self.text = text
        self.value: Value = None

    def describe(self) -> str:
        kind = self.kind
        name = "an exception" if kind is None else kind.name if isinstance(kind, ClassV) else kind.__name__
        return self.text if self.text.startswith(name) else f"{name}: {self.text}" if self.text else name


@dataclass
class Exit:
    """A way out of a block that is taken when `cond` holds: return, break, continue or raise."""

    cond: Cond
    kind: str
    value: Any = None


def is_scalar(value: Value) -> bool:
    return type(value) in SCALARS


def same(a: Value, b: Value) -> bool:
    """Whether two values are certainly the same object, or equal scalars of one type."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if type(a) in SCALARS:
        return bool(a == b)
    if type(a) is Maybe:
        return a.cond == b.cond and same(a.value, b.value)
    if type(a) is TupleV:
        return len(a.items) == len(b.items) and all(same(x, y) for x, y in zip(a.items, b.items, strict=False))
    return False
