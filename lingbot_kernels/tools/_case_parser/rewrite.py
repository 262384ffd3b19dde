"""Makes visible what Python gives no hook for: ``is``, ``in``, f-strings, calls of built-in functions, ``try``.

Places stay; each rewritten expression calls a helper, which is the plain operation unless a value isn't known.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .unknown import MARKED, Unknown, arguments, case_class, current, operation, plain, render

MACHINE = "depends on the machine"
# Library modules and built-in names that handle an unknown value as any other; all others give an unknown result.
_STRUCTURE = {
    *("dataclasses", "functools", "itertools", "copy", "enum", "typing", "contextlib", "operator", "collections"),
    *("types", "abc", "weakref", "warnings", "importlib", "_functools", "_operator", "_collections", "_abc"),
}
_REAL = {
    *("all", "any", "bool", "classmethod", "delattr", "dict", "enumerate", "filter", "frozenset", "getattr", "id"),
    *("iter", "list", "map", "max", "min", "next", "object", "print", "property", "reversed", "set", "setattr"),
    *("slice", "sorted", "staticmethod", "sum", "super", "tuple", "vars", "zip"),
}
_ORDERED = {list, tuple, enumerate, zip, map, filter}
_OWN_FRAME = {"super", "locals", "globals", "vars", "dir", "eval", "exec", "__import__"}  # they look at their caller


def unknown_call(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Unknown:
    owner, name = getattr(f, "__self__", None), getattr(f, "__name__", None) or render(f)
    if owner is not None and not isinstance(owner, types.ModuleType):
        name = f"{render(owner)}.{name}"
    key = f"{name}({arguments(args, kwargs)})"
    current().may_raise(key)
    return Unknown(key, next((v._origin for v in (*args, *kwargs.values()) if type(v) is Unknown), MACHINE))


def _call(f: Any, /, *args: Any, **kwargs: Any) -> Any:
    """``f(*args, **kwargs)``; an unknown value where a function of the library would need one that is known."""
    if type(f) is Unknown:
        return f(*args, **kwargs)
    owner, name = getattr(f, "__self__", None), getattr(f, "__name__", "")
    if name == "join" and type(owner) is str and type(args[0]) is not Unknown:
        args = ([str(v) if type(v) is Unknown else v for v in args[0]],)
    elif (isinstance(f, type) and f in _ORDERED) or (name == "extend" and type(owner) is list):
        args = tuple(map(_each, args))
    if not any(type(v) is Unknown for v in (*args, *kwargs.values())):
        return _text(f(*args, **kwargs))
    if isinstance(owner, dict) and name in ("get", "pop", "setdefault"):
        return f(next((k for k in owner if args[0] == k), args[0]), *args[1:])
    module = (getattr(f, "__module__", None) or type(owner).__module__ or "").partition(".")[0]
    real = module in _STRUCTURE or module not in sys.stdlib_module_names or isinstance(f, functools.partial)
    if module == "builtins":
        container = owner is not None and not isinstance(owner, (str, bytes, int, float, types.ModuleType, type))
        real = name in _REAL or container or len(args) == 3 or (isinstance(f, type) and issubclass(f, BaseException))
    return f(*args, **kwargs) if real else unknown_call(f, args, kwargs)


def _get(container: Any, index: Any) -> Any:
    if type(index) is Unknown and isinstance(container, (str, bytes)):
        return operation("{}[{}]", container, index)
    if type(index) is Unknown and isinstance(container, (list, tuple, dict)):
        keys = container if isinstance(container, dict) else range(min(len(container), 64))
        found = [k for k in keys if index == k][:1]
        if not found:
            raise LookupError("an unknown index is taken to be none of its own")
        index = found[0]
    return container[index]


def _text(value: Any) -> Any:
    """A text that holds one of an unknown value isn't known either."""
    found = MARKED.search(value) if type(value) is str else None
    return value if found is None else Unknown('f"' + MARKED.sub(r"{\1}", value) + '"', found[2])


def _same(left: Any, right: Any) -> Any:
    unknown = left is not right and Unknown in (type(left), type(right))
    return operation("{} is {}", left, right) if unknown else left is right


def _contains(item: Any, container: Any) -> Any:
    unknown = Unknown in (type(item), type(container))
    return operation("{} in {}", item, container) if unknown else item in container


def _each(values: Any) -> Any:
    """What a loop goes over; the order of a set is a decision, so that a list that takes it over is reported."""
    if type(values) not in (set, frozenset) or len(values) < 2 or all(isinstance(v, int) for v in values):
        return values
    file, line, column = current().site()
    where = f"order of the set at {Path(file).name}:{line}:{column}"
    return sorted(values, key=render, reverse=current().decide(where, kind="order"))


class Handled:
    """While it is entered, `caught` gives what a ``try`` around catches."""

    def __init__(self, caught: Callable[[], Any]) -> None:
        self.caught = caught

    def __enter__(self) -> None:
        current().handlers.append(self.caught)

    def __exit__(self, *_: Any) -> None:
        current().handlers.remove(self.caught)


@contextlib.contextmanager
def suppress(*kinds: Any) -> Iterator[None]:
    with contextlib.suppress(*kinds), Handled(lambda: kinds):
        yield


def _catch(kinds: Any) -> Any:
    """What an ``except`` catches; whether an unknown class catches the error is a decision."""
    if isinstance(kinds, tuple):
        return tuple(k for kind in kinds for k in (_catch(kind) if type(kind) is Unknown else (kind,)))
    if type(kinds) is not Unknown:
        return kinds
    return (Exception,) if current().decide(f"`{render(kinds)}` catches {type(sys.exc_info()[1]).__name__}") else ()


def _subject(value: Any) -> Any:
    if type(value) is Unknown:
        current().note(f"whether `{plain(render(value))}` has the form of a `case` isn't known")
    return value


_HELPERS = {
    "call": _call, "get": _get, "text": _text, "is": _same, "in": _contains, "each": _each,
    "handled": Handled, "catch": _catch, "subject": _subject, "case": case_class,
}  # fmt: skip
HELPERS = {f"__lk_{name}__": helper for name, helper in _HELPERS.items()}


def _helper(name: str, at: ast.AST, *args: Any, keywords: Any = ()) -> Any:
    helper = ast.copy_location(ast.Name(f"__lk_{name}__", ast.Load()), at)
    return ast.copy_location(ast.Call(helper, list(args), list(keywords)), at)


class _Rewriter(ast.NodeTransformer):
    """Rewrites a module's tree, annotations excepted."""

    def __init__(self, case_class: str) -> None:
        self.case_class = case_class

    def _annotated(self, node: ast.AST) -> Any:
        kept = {n: v for n in ("annotation", "returns") if (v := getattr(node, n, None)) is not None}
        for name in kept:
            setattr(node, name, None)
        self.generic_visit(node)
        vars(node).update(kept)
        return node

    visit_arg = visit_AnnAssign = visit_FunctionDef = visit_AsyncFunctionDef = _annotated

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        self.generic_visit(node)
        if node.name == self.case_class:
            node.decorator_list.insert(0, _helper("case", node).func)
        return node

    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        own = isinstance(node.func, ast.Name) and node.func.id in _OWN_FRAME
        return node if own else _helper("call", node, node.func, *node.args, keywords=node.keywords)

    def visit_Compare(self, node: ast.Compare) -> Any:
        self.generic_visit(node)
        name = {ast.Is: "is", ast.IsNot: "is", ast.In: "in", ast.NotIn: "in"}.get(type(node.ops[0]))
        if len(node.ops) > 1 or name is None:
            return node
        out = _helper(name, node, node.left, node.comparators[0])
        inverted = isinstance(node.ops[0], (ast.IsNot, ast.NotIn))
        return ast.copy_location(ast.UnaryOp(ast.Not(), out), node) if inverted else out

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        self.generic_visit(node)
        return _helper("text", node, node) if isinstance(node.op, ast.Mod) else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> Any:
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                part.value = self.visit(part.value)
        return _helper("text", node, node)

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        self.generic_visit(node)
        known = isinstance(node.slice, (ast.Constant, ast.Slice, ast.Tuple, ast.UnaryOp))
        return node if known or not isinstance(node.ctx, ast.Load) else _helper("get", node, node.value, node.slice)

    def _each(self, node: Any) -> Any:
        self.generic_visit(node)
        name = "value" if isinstance(node, ast.Starred) else "iter"
        if name == "iter" or isinstance(node.ctx, ast.Load):
            setattr(node, name, _helper("each", getattr(node, name), getattr(node, name)))
        return node

    visit_For = visit_comprehension = visit_Starred = _each

    def visit_Try(self, node: ast.Try) -> Any:
        self.generic_visit(node)
        if node.handlers:
            first = node.body[0]
            kinds = [h.type or ast.copy_location(ast.Name("Exception", ast.Load()), h) for h in node.handlers]
            nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
            caught = ast.Lambda(nothing, ast.copy_location(ast.Tuple(kinds, ast.Load()), first))
            guard = ast.withitem(_helper("handled", first, ast.copy_location(caught, first)))
            node.body = [ast.copy_location(ast.With([guard], node.body), first)]
        for handler in node.handlers:
            handler.type = handler.type and _helper("catch", handler.type, handler.type)
        return node

    def visit_Match(self, node: Any) -> Any:
        self.generic_visit(node)
        patterns = {type(p).__name__ for case in node.cases for p in ast.walk(case.pattern)}
        if patterns & {"MatchClass", "MatchSequence", "MatchMapping"}:
            node.subject = _helper("subject", node.subject, node.subject)
        return node


@functools.cache
def compiled(path: str, case_class: str) -> types.CodeType:
    """The code of a file, rewritten. Raises `SyntaxError`."""
    tree = _Rewriter(case_class).visit(ast.parse(Path(path).read_bytes(), path))
    return compile(tree, path, "exec", dont_inherit=True)
