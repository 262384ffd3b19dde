"""The second reader: reads the literal forms of a config's tree, as upstream's reader does; runs nothing.

Independent of the first: an id that it sees and that no world has is reported.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import Duplicate, ParsedCase, ParsedConfig, Unresolved


@dataclass(frozen=True)
class Found:
    """A case in a list's literal, append, extend or ``+=``."""

    list: str
    id: str
    line: int
    column: int
    condition: str | None


class _NotConstant(Exception):
    """An expression that this reader doesn't work out."""


class CaseVisitor(ast.NodeVisitor):
    """Visits a config's tree; afterwards `cases` has the ids by list, `unresolved` what it can't read."""

    def __init__(
        self,
        config_path: Path | None,
        *,
        list_to_suite: Mapping[str, str],
        case_class: str,
        id_param: str,
        source: str = "",
    ) -> None:
        self.config_path = config_path
        self.list_to_suite = dict(list_to_suite)
        self.case_class, self.id_param = case_class, id_param
        self.lines = source.splitlines()
        self.cases: dict[str, list[str]] = {}
        self.found: list[Found] = []
        self._entries: dict[str, list[Found]] = {}
        self._reports: dict[tuple[int, int], str] = {}
        self._classes = {case_class}
        self._functions: dict[str, ast.FunctionDef | ast.AsyncFunctionDef] = {}
        self._constants: dict[str, Any] = {}
        self._stores: Counter[str] = Counter()
        self._conditions: list[str] = []

    # -- statements ------------------------------------------------------------------------------------------------

    def visit_Module(self, node: ast.Module) -> None:
        """Read a module: first its functions and names, then its statements in order."""
        self._stores.update(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load))
        for statement in node.body:
            self.visit(statement)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._functions[node.name] = node
        for decorator in node.decorator_list:
            if not ast.unparse(decorator).startswith("pytest."):
                self._unread(decorator, node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._functions[node.name] = node

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if node.name != self.case_class:
            self._unread(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if alias.name == self.case_class:
                self._classes.add(alias.asname or alias.name)
            if alias.name == "*" or (alias.asname or alias.name) in self.list_to_suite:
                self._report(node, "this reader follows no import")

    def visit_Import(self, node: ast.Import) -> None:
        pass

    def visit_Assign(self, node: ast.Assign) -> None:
        self._assign(node.targets, node.value, node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._assign([node.target], node.value, node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        name = node.target.id if isinstance(node.target, ast.Name) else ""
        ids = self._list(name, node.value) if isinstance(node.op, ast.Add) and name in self._entries else None
        self._add(name, ids, node)

    def visit_Expr(self, node: ast.Expr) -> None:
        self._process_expr(node)

    def visit_If(self, node: ast.If) -> None:
        test = ast.unparse(node.test)
        if test in ("__name__ == '__main__'", "TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return
        value = self._known(node.test)
        if value is not False:
            self._block(node.body, None if value else test)
        if value is not True:
            self._block(node.orelse, None if value is False else f"not ({test})")

    def visit_Match(self, node: Any) -> None:
        try:
            subject: Any = [self._constant(node.subject, {})]
        except _NotConstant:
            subject = []
        for case in node.cases:
            takes = self._matches(case, subject[0]) if subject else None
            if takes is not False:
                self._block(case.body, None if takes else f"`case {ast.unparse(case.pattern)}` of line {node.lineno}")
            if takes:
                return

    def _matches(self, case: Any, subject: Any) -> bool | None:
        pattern = case.pattern
        alternatives = pattern.patterns if type(pattern).__name__ == "MatchOr" else [pattern]
        if case.guard is not None:
            return None
        if any(type(p).__name__ == "MatchAs" and p.pattern is None for p in alternatives):
            return True
        if not all(type(p).__name__ == "MatchValue" and isinstance(p.value, ast.Constant) for p in alternatives):
            return None
        return any(p.value.value == subject for p in alternatives)

    def generic_visit(self, node: ast.AST) -> None:
        """Any other statement: its blocks, conditional."""
        if not isinstance(node, ast.stmt):
            return
        blocks = [b for b in (getattr(node, n, []) for n in ("body", "orelse", "finalbody")) if b]
        blocks += [h.body for h in getattr(node, "handlers", [])]
        if blocks:
            kind = type(node).__name__.lower()
            for block in blocks:
                self._block(block, f"`{kind}` of line {node.lineno}")
            heads = [getattr(node, n, None) for n in ("test", "iter", "target")]
            for head in [*heads, *(i.context_expr for i in getattr(node, "items", []))]:
                if head is not None:
                    self._unread(head, node)
            if isinstance(node, (ast.For, ast.While)) and self._mentions(node):
                self._report(node, "this reader runs no loop")
        else:
            self._unread(node)

    def _block(self, body: list[ast.stmt], condition: str | None) -> None:
        self._conditions += [condition] if condition else []
        for statement in body:
            self.visit(statement)
        if condition:
            self._conditions.pop()

    def _assign(self, targets: list[ast.expr], value: ast.expr, node: ast.stmt) -> None:
        names = [t.id for t in targets if isinstance(t, ast.Name)]
        if len(names) == len(targets) == 1:
            name = names[0]
            ids = self._list(name, value)
            if ids is not None:
                if not self._conditions:
                    self._entries[name], self.cases[name] = [], []
                self._add(name, ids, node)
                return
            try:
                if self._stores[name] == 1:
                    self._constants[name] = self._constant(value, {})
                    return
            except _NotConstant:
                pass
        self._unread(node)

    def _process_expr(self, node: ast.AST) -> None:
        """Read an expression statement, such as ``ONE_GPU_CASES.append(make())``."""
        call = node.value if isinstance(node, ast.Expr) else node
        if not isinstance(call, ast.AST) or not isinstance(call, (ast.expr, ast.stmt)):
            raise TypeError(f"node must be an expression or a statement, got {type(node).__name__}")
        f = call.func if isinstance(call, ast.Call) else None
        if isinstance(call, ast.Call) and isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name):
            name = f.value.id
            if f.attr in ("append", "extend") and len(call.args) == 1 and not call.keywords and name in self._entries:
                value = call.args[0] if f.attr == "extend" else ast.List([call.args[0]], ast.Load())
                self._add(name, self._list(name, ast.copy_location(value, call.args[0])), call)
                return
        if not isinstance(call, ast.Constant):
            self._unread(call)

    # -- values ----------------------------------------------------------------------------------------------------

    def _list(self, name: str, node: ast.expr) -> list[Found] | None:
        """The cases of a list expression; None where it isn't one that this reader knows."""
        if isinstance(node, ast.Name):
            known = self._entries.get(node.id)
            return None if known is None else [Found(name, f.id, f.line, f.column, f.condition) for f in known]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self._list(name, node.left), self._list(name, node.right)
            return None if left is None or right is None else left + right
        if not isinstance(node, (ast.List, ast.Tuple)) or (isinstance(node, ast.Tuple) and name not in self._entries):
            return None
        out: list[Found] = []
        condition = " and ".join(f"({c})" if " or " in c else c for c in self._conditions) or None
        for element in node.elts:
            if isinstance(element, ast.Starred):
                inner = self._list(name, element.value)
                if inner is None:
                    self._unread(element, always=name in self.list_to_suite)
                out += inner or []
                continue
            case_id = self._extract_factory_case_id(element)
            if case_id is not None:
                out.append(Found(name, case_id, element.lineno, element.col_offset + 1, condition))
            else:
                self._unread(element, always=name in self.list_to_suite)
        return out

    def _add(self, name: str, ids: list[Found] | None, node: ast.AST) -> None:
        if ids is None:
            self._unread(node)
            return
        self._entries.setdefault(name, []).extend(ids)
        self.cases[name] = [f.id for f in self._entries[name]]
        if name in self.list_to_suite:
            self.found += ids

    def _extract_factory_case_id(self, node: ast.AST) -> str | None:
        """Id of the case that a call of the class or of a factory gives, or a factory; None where none is seen."""
        if isinstance(node, ast.Expr):
            node = node.value
        try:
            if isinstance(node, (ast.FunctionDef, ast.Lambda)):
                return self._returned(node, {})
            return self._case_id(node, {}, 0)
        except _NotConstant:
            return None

    def _case_id(self, node: ast.AST | None, names: dict[str, Any], depth: int) -> str:
        if not isinstance(node, ast.Call) or depth > 8:
            raise _NotConstant
        f = node.func
        called = f.id if isinstance(f, ast.Name) else f.attr if isinstance(f, ast.Attribute) else ""
        if called in self._classes:
            given = [k.value for k in node.keywords if k.arg == self.id_param] or node.args[:1]
            value = self._constant(given[0], names) if given else None
            if not isinstance(value, str):
                raise _NotConstant
            return value
        function = self._functions.get(called)
        if not isinstance(function, ast.FunctionDef) or not isinstance(f, ast.Name) or function.decorator_list:
            raise _NotConstant
        a = function.args
        params = [*a.posonlyargs, *a.args]
        bound: dict[str, ast.expr] = {}
        bound.update((p.arg, d) for p, d in zip(params[len(params) - len(a.defaults) :], a.defaults))  # noqa: B905
        bound.update((p.arg, d) for p, d in zip(a.kwonlyargs, a.kw_defaults) if d is not None)  # noqa: B905
        bound.update((p.arg, v) for p, v in zip(params, node.args))  # noqa: B905
        bound.update((k.arg, k.value) for k in node.keywords if k.arg is not None)
        inner: dict[str, Any] = {p.arg: _NotConstant for p in [*params, *a.kwonlyargs]}
        for key, value_node in bound.items():
            try:
                inner[key] = self._constant(value_node, names)
            except _NotConstant:
                continue
        return self._returned(function, inner, depth + 1)

    def _returned(self, function: ast.FunctionDef | ast.Lambda, names: dict[str, Any], depth: int = 0) -> str:
        if isinstance(function, ast.Lambda):
            return self._case_id(function.body, names, depth)
        returns = [n.value for n in ast.walk(function) if isinstance(n, ast.Return)]
        if len(returns) != 1 or any(isinstance(n, (ast.Yield, ast.YieldFrom)) for n in ast.walk(function)):
            raise _NotConstant
        stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        return self._case_id(returns[0], {**names, **dict.fromkeys(stored, _NotConstant)}, depth)

    def _constant(self, node: ast.AST, names: dict[str, Any]) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            value = names.get(node.id, self._constants.get(node.id, _NotConstant))
            if value is not _NotConstant:
                return value
        if isinstance(node, ast.JoinedStr):
            return "".join(str(self._constant(v, names)) for v in node.values)
        if isinstance(node, ast.FormattedValue) and node.conversion == -1 and node.format_spec is None:
            return str(self._constant(node.value, names))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self._constant(node.left, names), self._constant(node.right, names)
            if isinstance(left, str) and isinstance(right, str) and len(left) + len(right) < 10_000:
                return left + right
        raise _NotConstant

    def _known(self, test: ast.expr) -> bool | None:
        """The outcome of a test of constants; None where it isn't one."""
        try:
            if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
                inner = self._known(test.operand)
                return None if inner is None else not inner
            if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], (ast.Eq, ast.NotEq)):
                equal = self._constant(test.left, {}) == self._constant(test.comparators[0], {})
                return bool(equal) == isinstance(test.ops[0], ast.Eq)
            return bool(self._constant(test, {}))
        except _NotConstant:
            return None

    # -- reports ---------------------------------------------------------------------------------------------------

    def _mentions(self, node: ast.AST, seen: frozenset[str] = frozenset()) -> bool:
        """Whether a list or a case could be changed here, in a function that is called too."""
        hidden = {"exec", "eval", "globals", "setattr", "vars", "modules", "__import__", "import_module"}
        for n in ast.walk(node):
            name = n.id if isinstance(n, ast.Name) else n.attr if isinstance(n, ast.Attribute) else ""
            if name in self.list_to_suite or name in self._classes or name in hidden:
                return True
            if self._entries.get(name):
                return True
            if name in self._functions and name not in seen and self._mentions(self._functions[name], seen | {name}):
                return True
        return False

    def _unread(self, node: ast.AST, at: ast.AST | None = None, *, always: bool = False) -> None:
        if always or self._mentions(node):
            self._report(node if hasattr(node, "lineno") else at or node, "this reader doesn't know the form")

    def _report(self, node: Any, reason: str) -> None:
        self._reports.setdefault((getattr(node, "lineno", 1), getattr(node, "col_offset", 0) + 1), reason)

    @property
    def unresolved(self) -> list[Unresolved]:
        """What could hide a case from this reader."""
        file = str(self.config_path) if self.config_path is not None else "<config>"
        return [
            Unresolved(
                file, line, column, self.lines[line - 1].strip()[:200] if line <= len(self.lines) else "", reason
            )
            for (line, column), reason in sorted(self._reports.items())
        ]

    def config(self) -> ParsedConfig:
        """Everything that this reader sees, as the answer about a config."""
        out = ParsedConfig(suites={s: [] for s in self.list_to_suite.values()}, unresolved=self.unresolved)
        where: dict[str, list[tuple[str, Found]]] = {}
        for name, suite in self.list_to_suite.items():
            for f in self._entries.get(name, []):
                where.setdefault(f.id, []).append((suite, f))
        for case_id, places in where.items():
            kept: dict[str, ParsedCase] = {}
            for suite, f in places:
                always = any(g.condition is None for s, g in places if s == suite)
                conditions = dict.fromkeys(g.condition for s, g in places if s == suite)
                text = None if always else " or ".join(str(c) for c in conditions)
                kept.setdefault(suite, ParsedCase(case_id, f.list, f.line, text))
            if len(places) > 1:
                suites = list(kept)
                lists = list(dict.fromkeys(f.list for _, f in places))
                out.duplicates.append(Duplicate(case_id, suites, lists, [f.line for _, f in places]))
            for suite, case in kept.items():
                out.suites[suite].append(case)
        out.lists = {
            n: list(dict.fromkeys(f.id for f in es)) for n, es in self._entries.items() if es or n in self.list_to_suite
        }
        out.other_lists = {
            n: ids for n, ids in out.lists.items() if n not in self.list_to_suite and not set(ids) <= set(where)
        }
        return out
