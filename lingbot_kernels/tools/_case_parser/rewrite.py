"""Makes visible what Python gives no hook for: ``is``, ``in``, ``not``, f-strings, calls of built-in functions.

Lines and columns stay; each rewritten expression calls a helper of `support` that is the plain operation unless an
unknown value takes part.
"""

from __future__ import annotations

import ast
import types
from typing import Any

# These look at the frame that calls them.
_OWN_FRAME = {"super", "locals", "globals", "vars", "dir", "eval", "exec", "__import__"}


def _name(name: str, at: ast.AST) -> ast.expr:
    return ast.copy_location(ast.Name(f"__lk_{name}__", ast.Load()), at)


def _call(name: str, at: ast.AST, *args: ast.expr, keywords: list[ast.keyword] | None = None) -> Any:
    return ast.copy_location(ast.Call(_name(name, at), list(args), keywords or []), at)


def _constant(node: ast.AST | None) -> bool:
    if isinstance(node, ast.Slice):
        return all(_constant(part) for part in (node.lower, node.upper, node.step))
    if isinstance(node, ast.UnaryOp):
        node = node.operand
    return node is None or isinstance(node, ast.Constant)


def _index(node: ast.expr) -> ast.expr | None:
    """A subscript as an expression of its own; None where it needs none or can't have one."""
    if _constant(node) or (isinstance(node, ast.Tuple) and any(isinstance(e, ast.Slice) for e in node.elts)):
        return None
    if isinstance(node, ast.Slice):
        parts = [p or ast.copy_location(ast.Constant(None), node) for p in (node.lower, node.upper, node.step)]
        return _call("slice", node, *parts)  # type: ignore[no-any-return]
    return node


class Rewriter(ast.NodeTransformer):
    """Rewrites a module's tree; annotations stay as they are."""

    def __init__(self, case_class: str) -> None:
        self.case_class = case_class

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def _function(self, node: Any) -> ast.AST:
        returns, node.returns = node.returns, None
        self.generic_visit(node)
        node.returns = returns
        return node  # type: ignore[no-any-return]

    visit_FunctionDef = visit_AsyncFunctionDef = _function

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        if node.name == self.case_class:
            node.decorator_list.insert(0, _name("case", node))
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        plain = isinstance(node.func, ast.Name) and node.func.id in _OWN_FRAME
        self.generic_visit(node)
        for k in node.keywords:
            if k.arg is None:
                k.value = _call("mapping", k.value, k.value)
        return node if plain else _call("call", node, node.func, *node.args, keywords=node.keywords)  # type: ignore[no-any-return]

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        return _call("not", node, node.operand) if isinstance(node.op, ast.Not) else node  # type: ignore[no-any-return]

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        names = {ast.Is: "is", ast.IsNot: "is", ast.In: "in", ast.NotIn: "in"}
        name = names.get(type(node.ops[0])) if len(node.ops) == 1 else None
        if name is None:
            return node
        out = _call(name, node, node.left, node.comparators[0])
        return _call("not", node, out) if isinstance(node.ops[0], (ast.IsNot, ast.NotIn)) else out  # type: ignore[no-any-return]

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        return _call("mod", node, node.left, node.right) if isinstance(node.op, ast.Mod) else node  # type: ignore[no-any-return]

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        self.generic_visit(node)
        parts: list[ast.expr] = []
        for v in node.values:
            if isinstance(v, ast.FormattedValue):
                rest = [ast.Constant(v.conversion), v.format_spec or ast.Constant("")]
                v = ast.Tuple([v.value, *rest], ast.Load())
            parts.append(v)
        return ast.fix_missing_locations(_call("text", node, *parts))  # type: ignore[no-any-return]

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        index = _index(node.slice) if isinstance(node.ctx, ast.Load) else None
        return node if index is None else _call("get", node, node.value, index)  # type: ignore[no-any-return]

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        target = node.targets[0]
        index = _index(target.slice) if len(node.targets) == 1 and isinstance(target, ast.Subscript) else None
        if index is None or not isinstance(target, ast.Subscript):
            return node
        return ast.copy_location(ast.Expr(_call("set", node, node.value, target.value, index)), node)

    def visit_Delete(self, node: ast.Delete) -> ast.AST:
        self.generic_visit(node)
        target = node.targets[0]
        index = _index(target.slice) if len(node.targets) == 1 and isinstance(target, ast.Subscript) else None
        if index is None or not isinstance(target, ast.Subscript):
            return node
        return ast.copy_location(ast.Expr(_call("del", node, target.value, index)), node)

    def _each(self, node: Any) -> ast.AST:
        self.generic_visit(node)
        node.iter = _call("each", node.iter, node.iter)
        return node  # type: ignore[no-any-return]

    visit_For = visit_comprehension = _each

    def visit_Starred(self, node: ast.Starred) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Load):
            node.value = _call("each", node.value, node.value)
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        self.generic_visit(node)
        error = ast.copy_location(
            ast.Call(ast.Name("AssertionError", ast.Load()), [node.msg] if node.msg else [], []), node
        )
        failed = ast.If(_call("not", node, node.test), [ast.copy_location(ast.Raise(error, None), node)], [])
        return ast.fix_missing_locations(ast.copy_location(failed, node))

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        self.generic_visit(node)
        if node.exc is not None:
            node.exc = _call("raise", node.exc, node.exc)
        return node

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        self.generic_visit(node)
        if node.type is not None:
            node.type = _call("catch", node.type, node.type)
        return node

    def visit_Match(self, node: Any) -> ast.AST:
        node.subject = self.visit(node.subject)
        for case in node.cases:
            case.guard = self.visit(case.guard) if case.guard else None
            case.body = [self.visit(s) for s in case.body]
        kinds = ("MatchClass", "MatchSequence", "MatchMapping")
        if any(type(p).__name__ in kinds for case in node.cases for p in ast.walk(case.pattern)):
            node.subject = _call("subject", node.subject, node.subject)
        return node  # type: ignore[no-any-return]


Try = tuple[int, int, list["types.CodeType | None"]]


def tries(tree: ast.AST, path: str) -> list[Try]:
    """Bodies of ``try`` and of ``with suppress``: first and last line, and what they catch (None: everything)."""
    out: list[Try] = []

    def add(body: list[ast.stmt], caught: list[ast.expr | None]) -> None:
        codes = [
            None if c is None else compile(ast.fix_missing_locations(ast.Expression(c)), path, "eval") for c in caught
        ]
        out.append((body[0].lineno, body[-1].end_lineno or body[-1].lineno, codes))

    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and node.handlers:
            add(node.body, [h.type for h in node.handlers])
        elif isinstance(node, ast.With):
            for item in node.items:
                call = item.context_expr
                if (
                    isinstance(call, ast.Call)
                    and getattr(call.func, "attr", getattr(call.func, "id", "")) == "suppress"
                ):
                    add(node.body, list(call.args))
    return sorted(out, key=lambda t: t[0], reverse=True)


def compile_file(source: bytes, path: str, case_class: str) -> tuple[types.CodeType, list[Try]]:
    """The code of a file, rewritten, and its ``try`` bodies. Raises `SyntaxError`."""
    tree = ast.parse(source, path)
    found = tries(tree, path)
    tree = ast.fix_missing_locations(Rewriter(case_class).visit(tree))
    return compile(tree, path, "exec", dont_inherit=True), found
