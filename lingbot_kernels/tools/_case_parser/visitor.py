"""The second reader: reads the literal forms of a config's tree, as upstream's reader does; runs nothing.

Independent of the first: an id that it sees and that no world has is reported.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .results import Duplicate, Options, ParsedCase, ParsedConfig, Unresolved

CASE_LIST_TO_SUITE = {
    "ONE_GPU_CASES": "1-gpu",
    "ONE_GPU_CASES_A": "1-gpu",
    "ONE_GPU_CASES_B": "1-gpu",
    "ONE_GPU_CASES_C": "1-gpu-b200",
    "ONE_GPU_MODELOPT_CASES": "1-gpu-b200",
    "ONE_GPU_B200_CASES": "1-gpu-b200",
    "TWO_GPU_CASES": "2-gpu",
    "TWO_GPU_CASES_A": "2-gpu",
    "TWO_GPU_CASES_B": "2-gpu",
}
"""List variable -> suite; the order of the lists is the order of a suite's cases."""
_REFLECTION = {"exec", "eval", "globals", "setattr", "vars", "modules", "__import__", "import_module"}


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


class DiffusionTestCaseVisitor(ast.NodeVisitor):
    """Visits a config's tree; afterwards `cases` has the ids by list, `unresolved` what it can't read.

    It knows literal lists, ``append``, ``extend`` and ``+=`` of a case or of a factory's case with a constant id.
    """

    def __init__(
        self,
        config_path: Path | None = None,
        *,
        list_to_suite: Mapping[str, str] | None = None,
        case_class: str = Options.case_class,
        id_param: str = Options.id_param,
        source: str = "",
    ) -> None:
        self.config_path, self.id_param = config_path, id_param
        self.list_to_suite = dict(list_to_suite or CASE_LIST_TO_SUITE)
        self.lines = source.splitlines()
        self.found: list[Found] = []
        self._entries: dict[str, list[Found]] = {}
        self._reports: dict[tuple[int, int], str] = {}
        self._class, self._classes = case_class, {case_class}
        self._functions: dict[str, ast.FunctionDef] = {}
        self._constants: dict[str, Any] = {}
        self._conditions: list[str] = []

    @property
    def cases(self) -> dict[str, list[str]]:
        """Ids by list."""
        return {n: [f.id for f in found] for n, found in self._entries.items()}

    def visit_Module(self, node: ast.Module) -> None:
        """Read a module's statements in order."""
        for statement in node.body:
            self.visit(statement)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._functions[node.name] = node
        if any(not ast.unparse(d).startswith("pytest.") for d in node.decorator_list):
            self._unread(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self._classes |= {a.asname or a.name for a in node.names if a.name == self._class}
        if any(a.name == "*" or (a.asname or a.name) in self.list_to_suite for a in node.names):
            self._report(node, "this reader follows no import")

    def visit_If(self, node: ast.If) -> None:
        test = ast.unparse(node.test)
        if test not in ("__name__ == '__main__'", "TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self._block(node.body, test)
            self._block(node.orelse, f"not ({test})")

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if node.name != self._class:
            self._unread(node)

    def visit_Assign(self, node: Any) -> None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        name = targets[0].id if len(targets) == 1 and isinstance(targets[0], ast.Name) else ""
        found = self._list(name, node.value) if name and node.value is not None else None
        if found is not None:
            self._entries[name] = self._entries.get(name, []) if self._conditions else []
            self._add(name, found, node)
            return
        try:
            self._constants[name] = self._constant(node.value, {})
        except _NotConstant:
            self._constants[name] = _NotConstant
            self._unread(node)

    visit_AnnAssign = visit_Assign

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        name = node.target.id if isinstance(node.target, ast.Name) else ""
        self._constants[name] = _NotConstant
        self._add(
            name, self._list(name, node.value) if isinstance(node.op, ast.Add) and name in self._entries else None, node
        )

    def visit_Expr(self, node: ast.Expr) -> None:
        self._process_expr(node)

    def generic_visit(self, node: ast.AST) -> None:
        """Any other statement: its blocks, conditional."""
        blocks = [b for n in ("body", "orelse", "finalbody") if isinstance(b := getattr(node, n, None), list)]
        blocks += [h.body for n in ("handlers", "cases") for h in getattr(node, n, [])]
        for block in blocks:
            self._block(block, f"the `{type(node).__name__.lower()}` of line {getattr(node, 'lineno', 1)}")
        if isinstance(node, ast.stmt) and (not blocks or isinstance(node, (ast.For, ast.While))):
            self._unread(node)

    def _block(self, body: list[ast.stmt], condition: str) -> None:
        self._conditions.append(condition)
        for statement in body:
            self.visit(statement)
        self._conditions.pop()

    def _process_expr(self, node: ast.AST) -> None:
        """Read an expression statement, such as ``ONE_GPU_CASES.append(make())``."""
        call = node.value if isinstance(node, ast.Expr) else node
        if not isinstance(call, (ast.expr, ast.stmt)):
            raise TypeError(f"node must be an expression or a statement, got {type(node).__name__}")
        f = call.func if isinstance(call, ast.Call) else None
        name = f.value.id if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) else ""
        known = isinstance(f, ast.Attribute) and f.attr in ("append", "extend") and name in self._entries
        if known and isinstance(call, ast.Call) and isinstance(f, ast.Attribute) and len(call.args) == 1:
            value = call.args[0] if f.attr == "extend" else ast.List([call.args[0]], ast.Load())
            self._add(name, self._list(name, value), call)
        else:
            self._unread(call)

    def _list(self, name: str, node: ast.AST) -> list[Found] | None:
        """The cases of a list expression; None where it isn't one that this reader knows."""
        if isinstance(node, ast.Name) and node.id in self._entries:
            return [replace(f, list=name) for f in self._entries[node.id]]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self._list(name, node.left), self._list(name, node.right)
            return None if left is None or right is None else left + right
        if not isinstance(node, (ast.List, ast.Tuple)):
            return None
        out: list[Found] = []
        condition = " and ".join(f"({c})" if " or " in c else c for c in self._conditions) or None
        for element in node.elts:
            inner = self._list(name, element.value) if isinstance(element, ast.Starred) else None
            case_id = self._extract_factory_case_id(element)
            out += inner or []
            if case_id is not None:
                out.append(Found(name, case_id, element.lineno, element.col_offset + 1, condition))
            elif inner is None and (name in self.list_to_suite or self._mentions(element)):
                self._report(element, "this reader doesn't know the form")
        return out if out or name in self.list_to_suite or not node.elts else None

    def _add(self, name: str, found: list[Found] | None, node: ast.AST) -> None:
        if found is None:
            self._unread(node)
        else:
            self._entries.setdefault(name, []).extend(found)
            self.found += found if name in self.list_to_suite else []

    def _extract_factory_case_id(self, node: ast.AST) -> str | None:
        """Id of the case that a call of the class or of a factory gives, or a factory; None where none is seen."""
        try:
            if isinstance(node, (ast.FunctionDef, ast.Lambda)):
                return self._returned(node, {}, 0)
            return self._case_id(node.value if isinstance(node, ast.Expr) else node, {}, 0)
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
            if isinstance(value, str):
                return value
        function = self._functions.get(called)
        if function is None or not isinstance(f, ast.Name) or function.decorator_list:
            raise _NotConstant
        a = function.args
        params = [*a.posonlyargs, *a.args]
        bound: dict[str, Any] = {p.arg: None for p in [*params, *a.kwonlyargs]}
        bound.update(zip((p.arg for p in params[len(params) - len(a.defaults) :]), a.defaults, strict=True))
        bound.update(zip((p.arg for p in a.kwonlyargs), a.kw_defaults, strict=True))
        bound.update(zip((p.arg for p in params), node.args, strict=False))
        bound.update((k.arg, k.value) for k in node.keywords if k.arg is not None)
        inner: dict[str, Any] = {}
        for key, expression in bound.items():
            try:
                inner[key] = self._constant(expression, names)
            except _NotConstant:
                inner[key] = _NotConstant
        return self._returned(function, inner, depth + 1)

    def _returned(self, function: ast.FunctionDef | ast.Lambda, names: dict[str, Any], depth: int) -> str:
        nodes = list(ast.walk(function))
        returns = [n.value for n in nodes if isinstance(n, ast.Return)]
        if isinstance(function, ast.FunctionDef) and len(returns) != 1:
            raise _NotConstant
        stored = {n.id: _NotConstant for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        body = returns[0] if isinstance(function, ast.FunctionDef) else function.body
        return self._case_id(body, {**names, **stored}, depth)

    def _constant(self, node: Any, names: dict[str, Any]) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            value = names.get(node.id, self._constants.get(node.id, _NotConstant))
            if value is not _NotConstant:
                return value
        if isinstance(node, ast.JoinedStr):
            return "".join(str(self._constant(v, names)) for v in node.values)
        if isinstance(node, ast.FormattedValue) and node.conversion == -1 and node.format_spec is None:
            return self._constant(node.value, names)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            both = self._constant(node.left, names), self._constant(node.right, names)
            if isinstance(both[0], str) and isinstance(both[1], str) and len(both[0] + both[1]) < 10_000:
                return both[0] + both[1]
        raise _NotConstant

    def _mentions(self, node: ast.AST, seen: frozenset[str] = frozenset()) -> bool:
        """Whether a list or a case could be changed here, or in a function that is called."""
        names = {n.id if isinstance(n, ast.Name) else getattr(n, "attr", "") for n in ast.walk(node)}
        held = {n for n, found in self._entries.items() if found}
        called = (self._mentions(self._functions[n], seen | {n}) for n in names & self._functions.keys() - seen)
        return bool(names & (self._classes | self.list_to_suite.keys() | _REFLECTION | held)) or any(called)

    def _unread(self, node: ast.AST) -> None:
        if self._mentions(node):
            self._report(node, "this reader doesn't know the form")

    def _report(self, node: Any, reason: str) -> None:
        self._reports.setdefault((node.lineno, node.col_offset + 1), reason)

    @property
    def unresolved(self) -> list[Unresolved]:
        """What could hide a case from this reader."""
        file, lines = str(self.config_path or "<config>"), dict(enumerate(self.lines, 1))
        found = sorted(self._reports.items())
        return [Unresolved(file, n, c, lines.get(n, "").strip()[:200], reason) for (n, c), reason in found]

    def config(self) -> ParsedConfig:
        """Everything that this reader sees, as the answer about a config."""
        out = ParsedConfig(suites={s: [] for s in self.list_to_suite.values()}, unresolved=self.unresolved)
        where: dict[str, list[tuple[str, Found]]] = {}
        for name, suite in self.list_to_suite.items():
            for f in self._entries.get(name, []):
                where.setdefault(f.id, []).append((suite, f))
        for case_id, places in where.items():
            for suite in dict.fromkeys(s for s, _ in places):
                found = [f for s, f in places if s == suite]
                text = " or ".join(dict.fromkeys(f.condition or "" for f in found))
                text_or_none = text if all(f.condition for f in found) else None
                out.suites[suite].append(ParsedCase(case_id, found[0].list, found[0].line, text_or_none))
            if len(places) > 1:
                lists = list(dict.fromkeys(f.list for _, f in places))
                suites = list(dict.fromkeys(s for s, _ in places))
                out.duplicates.append(Duplicate(case_id, suites, lists, [f.line for _, f in places]))
        out.lists = {n: list(dict.fromkeys(ids)) for n, ids in self.cases.items() if ids or n in self.list_to_suite}
        out.other_lists = {
            n: i for n, i in out.lists.items() if n not in self.list_to_suite and not where.keys() >= set(i)
        }
        return out
