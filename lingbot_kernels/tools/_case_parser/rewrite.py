"""Makes visible what Python gives no hook for: ``is``, ``in``, ``not``, f-strings, calls of built-in functions.

Places stay; each rewritten expression calls a helper of `support`, the plain operation unless a value isn't known.
"""

from __future__ import annotations

import ast
import types
from typing import Any

_OWN_FRAME = {"super", "locals", "globals", "vars", "dir", "eval", "exec", "__import__"}  # they look at their caller
_HELPERS = {ast.Is: "is", ast.IsNot: "is", ast.In: "in", ast.NotIn: "in"}
Try = tuple[int, int, list["types.CodeType | None"]]  # first line, last line, what is caught (None: everything)


def _call(name: str, at: Any, *args: Any, keywords: Any = ()) -> Any:
    helper = ast.copy_location(ast.Name(f"__lk_{name}__", ast.Load()), at)
    return ast.copy_location(ast.Call(helper, list(args), list(keywords)), at)


def _plain(node: ast.AST | None) -> bool:
    """Whether a subscript can't be unknown, or can't stand alone."""
    if isinstance(node, ast.Slice):
        return all(map(_plain, (node.lower, node.upper, node.step)))
    if isinstance(node, ast.Tuple):
        return any(isinstance(e, ast.Slice) for e in node.elts)
    return node is None or isinstance(node.operand if isinstance(node, ast.UnaryOp) else node, ast.Constant)


def _index(node: Any) -> Any:
    if not isinstance(node, ast.Slice):
        return node
    return _call("slice", node, *(p or _constant(None, node) for p in (node.lower, node.upper, node.step)))


def _constant(value: Any, at: ast.AST) -> Any:
    return ast.copy_location(ast.Constant(value), at)


class _Rewriter(ast.NodeTransformer):
    """Rewrites a module's tree, annotations excepted, and collects its ``try`` bodies."""

    def __init__(self, case_class: str, path: str) -> None:
        self.case_class, self.path = case_class, path
        self.tries: list[Try] = []

    def visit_arg(self, node: ast.arg) -> Any:
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        node.value = node.value and self.visit(node.value)
        return node

    def _function(self, node: Any) -> Any:
        returns, node.returns = node.returns, None
        self.generic_visit(node)
        node.returns = returns
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = _function

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        self.generic_visit(node)
        if node.name == self.case_class:
            node.decorator_list.insert(0, _call("case", node).func)
        return node

    def visit_Call(self, node: ast.Call) -> Any:
        own = isinstance(node.func, ast.Name) and node.func.id in _OWN_FRAME
        self.generic_visit(node)
        for k in node.keywords:
            if k.arg is None:
                k.value = _call("mapping", k.value, k.value)
        return node if own else _call("call", node, node.func, *node.args, keywords=node.keywords)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        self.generic_visit(node)
        return _call("not", node, node.operand) if isinstance(node.op, ast.Not) else node

    def visit_Compare(self, node: ast.Compare) -> Any:
        self.generic_visit(node)
        op = type(node.ops[0])
        if len(node.ops) > 1 or op not in _HELPERS:
            return node
        out = _call(_HELPERS[op], node, node.left, node.comparators[0])
        return _call("not", node, out) if op in (ast.IsNot, ast.NotIn) else out

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        self.generic_visit(node)
        return _call("mod", node, node.left, node.right) if isinstance(node.op, ast.Mod) else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> Any:
        parts = []
        for v in node.values:
            part = v
            if isinstance(v, ast.FormattedValue):
                spec = self.visit(v.format_spec) if v.format_spec else _constant("", v)
                part = ast.Tuple([self.visit(v.value), _constant(v.conversion, v), spec], ast.Load())
            parts.append(ast.copy_location(part, node))
        return _call("text", node, *parts)

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        self.generic_visit(node)
        rewritten = isinstance(node.ctx, ast.Load) and not _plain(node.slice)
        return _call("get", node, node.value, _index(node.slice)) if rewritten else node

    def _store(self, node: Any) -> Any:
        self.generic_visit(node)
        target = node.targets[0]
        if len(node.targets) > 1 or not isinstance(target, ast.Subscript) or _plain(target.slice):
            return node
        value = [node.value] if isinstance(node, ast.Assign) else []
        return ast.copy_location(ast.Expr(_call("store", node, target.value, _index(target.slice), *value)), node)

    visit_Assign = visit_Delete = _store

    def _each(self, node: Any) -> Any:
        self.generic_visit(node)
        name = "value" if isinstance(node, ast.Starred) else "iter"
        if not isinstance(node, ast.Starred) or isinstance(node.ctx, ast.Load):
            setattr(node, name, _call("each", getattr(node, name), getattr(node, name)))
        return node

    visit_For = visit_comprehension = visit_Starred = _each

    def visit_Assert(self, node: ast.Assert) -> Any:
        self.generic_visit(node)
        error = _call("call", node, _call("case", node).func, *filter(None, [node.msg]))
        error.args[0].id = "AssertionError"
        failed = ast.copy_location(ast.Raise(error, None), node)
        return ast.copy_location(ast.If(_call("not", node, node.test), [failed], []), node)

    def visit_Raise(self, node: ast.Raise) -> Any:
        self.generic_visit(node)
        node.exc = node.exc and _call("raise", node.exc, node.exc)
        return node

    def visit_Try(self, node: Any) -> Any:
        self._caught(node, [h.type for h in node.handlers])
        self.generic_visit(node)
        for h in node.handlers:
            h.type = h.type and _call("catch", h.type, h.type)
        return node

    def visit_With(self, node: ast.With) -> Any:
        for call in (i.context_expr for i in node.items):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", getattr(call.func, "id", "")) == "suppress":
                self._caught(node, call.args)
        return self.generic_visit(node)

    def _caught(self, node: Any, types_: Any) -> None:
        codes = [t and compile(ast.Expression(t), self.path, "eval") for t in types_]
        self.tries.insert(0, (node.body[0].lineno, node.body[-1].end_lineno, codes))

    def visit_Match(self, node: Any) -> Any:
        node.subject = self.visit(node.subject)
        for case in node.cases:
            case.guard = case.guard and self.visit(case.guard)
            case.body = [self.visit(s) for s in case.body]
        patterns = (type(p).__name__ for case in node.cases for p in ast.walk(case.pattern))
        if {"MatchClass", "MatchSequence", "MatchMapping"} & set(patterns):
            node.subject = _call("subject", node.subject, node.subject)
        return node


def compile_file(source: bytes, path: str, case_class: str) -> tuple[types.CodeType, list[Try]]:
    """The code of a file, rewritten, and its ``try`` bodies. Raises `SyntaxError`."""
    rewriter = _Rewriter(case_class, path)
    tree = rewriter.visit(ast.parse(source, path))
    return compile(tree, path, "exec", dont_inherit=True), rewriter.tries
