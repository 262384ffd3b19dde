"""Names of a function body: which are local, which it reads, and whether it may change anything outside itself.

Pure functions of the AST.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class ScopeInfo:
    """What a function body binds and declares, and whether it yields."""

    local: frozenset[str]
    global_names: frozenset[str]
    nonlocal_names: frozenset[str]
    yields: bool


def parameters(args: ast.arguments) -> list[ast.arg]:
    out = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    out += [a for a in (args.vararg, args.kwarg) if a is not None]
    return out


def _walk(nodes: list[ast.AST]) -> Iterator[tuple[ast.AST, bool]]:
    """Nodes of this scope alone, and whether each is inside a comprehension; nested scopes' defaults are included."""
    stack: list[tuple[ast.AST, bool]] = [(n, False) for n in reversed(nodes)]
    while stack:
        node, inside = stack.pop()
        yield node, inside
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            defaults = [d for d in (*node.args.defaults, *node.args.kw_defaults) if d is not None]
            stack.extend((d, inside) for d in defaults)
            if not isinstance(node, ast.Lambda):
                stack.extend((d, inside) for d in node.decorator_list)
        elif isinstance(node, ast.ClassDef):
            stack.extend((d, inside) for d in (*node.decorator_list, *node.bases, *(k.value for k in node.keywords)))
        else:
            inside = inside or isinstance(node, _COMPREHENSIONS)
            stack.extend((child, inside) for child in ast.iter_child_nodes(node))


def scope_info(node: FunctionNode) -> ScopeInfo:
    """Local, global and nonlocal names of a function."""
    body: list[ast.AST] = [node.body] if isinstance(node, ast.Lambda) else list(node.body)
    local = {a.arg for a in parameters(node.args)}
    global_names: set[str] = set()
    nonlocal_names: set[str] = set()
    yields = False
    for n, inside in _walk(body):
        if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load) and not inside:
            local.add(n.id)
        elif isinstance(n, ast.NamedExpr):
            local.add(n.target.id)
        elif isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            local.add(n.name)
        elif isinstance(n, (ast.Import, ast.ImportFrom)):
            local.update((a.asname or a.name.split(".")[0]) for a in n.names)
        elif (isinstance(n, ast.ExceptHandler) and n.name) or (isinstance(n, (ast.MatchAs, ast.MatchStar)) and n.name):
            local.add(n.name)
        elif isinstance(n, ast.MatchMapping) and n.rest:
            local.add(n.rest)
        elif isinstance(n, ast.Global):
            global_names.update(n.names)
        elif isinstance(n, ast.Nonlocal):
            nonlocal_names.update(n.names)
        elif isinstance(n, (ast.Yield, ast.YieldFrom)):
            yields = True
    local -= global_names | nonlocal_names
    return ScopeInfo(frozenset(local), frozenset(global_names), frozenset(nonlocal_names), yields)


def names_read(node: ast.AST) -> set[str]:
    """Every name that occurs in `node`, nested scopes included."""
    out: set[str] = set()
    for n in ast.walk(node):
        if isinstance(n, ast.Name):
            out.add(n.id)
        elif isinstance(n, (ast.Global, ast.Nonlocal)):
            out.update(n.names)
    return out


_READING_METHODS = """
    get keys values items index count copy format join split strip lower upper startswith endswith replace title
    rsplit lstrip rstrip splitlines partition rpartition removeprefix removesuffix capitalize zfill casefold
"""
_READERS = frozenset(_READING_METHODS.split())


def may_mutate(node: ast.AST) -> bool:
    """Whether calling this function could change a container or a name outside it, by its text alone."""
    for n in ast.walk(node):
        if isinstance(n, (ast.Global, ast.Nonlocal, ast.Delete, ast.AugAssign)):
            return True
        if isinstance(n, (ast.Attribute, ast.Subscript)) and not isinstance(n.ctx, ast.Load):
            return True
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr not in _READERS:
            return True
        if isinstance(n, ast.Call) and not isinstance(n.func, (ast.Attribute, ast.Name)):
            return True
    return False


def target_names(node: ast.AST) -> Iterator[str]:
    for n in ast.walk(node):
        if isinstance(n, ast.Name):
            yield n.id
