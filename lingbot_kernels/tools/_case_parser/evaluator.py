"""The static evaluator of a config: reads files, follows imports inside the tree, runs module bodies abstractly."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
import warnings
from pathlib import Path

from .library import HARMLESS, LIBRARIES, SAFE_IMPORTS, Lib
from .limits import MAX_MODULES, MAX_SOURCE_BYTES, RECURSION_LIMIT, LimitReachedError, SourceError
from .values import ABSENT, Env, Library, Module, Namespace, PyRaise, Site, Value


def read_source(path: Path) -> str:
    """Text of a Python file in its declared encoding. Raises `SourceError`, or `OSError` as `open` does."""
    with path.open("rb") as f:
        data = f.read(MAX_SOURCE_BYTES + 1)
    if len(data) > MAX_SOURCE_BYTES:
        raise SourceError(f"the file has more than {MAX_SOURCE_BYTES:,} bytes; it isn't read")
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return io.StringIO(data.decode(encoding), newline=None).read()
    except (SyntaxError, UnicodeDecodeError, LookupError) as e:
        raise SourceError(f"the file can't be decoded: {e}") from None


def parse_source(text: str, name: str) -> ast.Module:
    """Syntax tree of a source text. Raises `SourceError` with the place of a syntax error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text, filename=name)
    except SyntaxError as e:
        shown = (e.text or "").strip()[:200]
        raise SourceError(f"syntax error: {e.msg}", e.lineno or 1, max(e.offset or 1, 1), shown) from None
    except (ValueError, RecursionError, MemoryError) as e:
        raise SourceError(f"the file can't be parsed: {e or type(e).__name__}") from None


class Evaluator(Lib):
    """Runs one config. `root`: the highest folder that imports are looked up in."""

    def __init__(self, *, case_class: str, id_param: str, root: Path | None = None) -> None:
        super().__init__()
        self.case_class_name = case_class
        self.id_param = id_param
        self.root = root
        self.modules: dict[str, Module] = {}

    # -- running ---------------------------------------------------------------------------------------------------

    def run_main(self, tree: ast.Module, path: Path | None, text: str) -> Module:
        """Run the config itself. What stops it is reported."""
        shown = "<config>" if path is None else str(path)
        module = self.new_module(shown, path.stem if path is not None else "config", text)
        self.main = self.module = module
        if path is not None:
            self.modules[str(path.resolve())] = module
        self.env = Env("module", module.ns, None, module)
        self.run_statements(tree.body)
        return module

    def run_statements(self, body: list[ast.stmt]) -> None:
        """Run statements at the config's top level."""
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(max(limit, RECURSION_LIMIT))
        place: ast.AST = body[0] if body else ast.Pass()
        try:
            self.run_in(self.env, body)
        except PyRaise as e:
            node = e.node or place
            if self.main is not None:
                node = node if hasattr(node, "lineno") else place
            self.report(
                Site(self.main or self.module, self._at(self.line)),
                f"raises {e.describe()} while it is imported; what follows isn't reached",
            )
        except LimitReachedError as e:
            self.report(
                Site(self.main or self.module, self._at(self.line)), f"stopped: {e}; what follows isn't evaluated"
            )
        except RecursionError:
            self.segments.clear()
            self.report(
                Site(self.main or self.module, self._at(self.line)),
                "stopped: nested too deeply; what follows isn't evaluated",
            )
        finally:
            sys.setrecursionlimit(limit)

    @staticmethod
    def _at(line: int) -> ast.AST:
        node = ast.Pass()
        node.lineno, node.col_offset = line, 0
        return node

    def new_module(self, path: str, name: str, text: str) -> Module:
        module = Module(path, name, text.split("\n"), Namespace(0))
        module.ns.vars["__name__"] = name
        place = Site(module, ast.Pass())
        from .values import Unknown

        module.ns.vars["__file__"] = Unknown("the path of a file", place, harmless=True, dotted="__file__")
        module.ns.vars["__doc__"] = Unknown("a docstring", place, harmless=True)
        return module

    # -- imports ---------------------------------------------------------------------------------------------------

    def exec_Import(self, stmt: ast.Import) -> None:
        for alias in stmt.names:
            whole = self.import_module(alias.name, 0, stmt)
            if alias.asname is not None or "." not in alias.name:
                self.bind(alias.asname or alias.name, whole)
                continue
            top = alias.name.split(".")[0]
            if isinstance(whole, Module):
                holder = self.unknown(stmt, f"package {top} isn't followed", dotted=top)
                self.report(
                    self.site(stmt), f"`import {alias.name}` without `as` isn't followed; use `from ... import ...`"
                )
                self.bind(top, holder)
            else:
                self.bind(top, self.import_module(top, 0, stmt))

    def exec_ImportFrom(self, stmt: ast.ImportFrom) -> None:
        if stmt.module == "__future__":
            self.module.postponed_annotations = True
            return
        source = self.import_module(stmt.module or "", stmt.level, stmt)
        for alias in stmt.names:
            if alias.name == "*":
                self.import_star(source, stmt)
                continue
            value: Value = ABSENT
            if isinstance(source, Module):
                value = source.ns.vars.get(alias.name, ABSENT)
                if value is ABSENT:
                    nested = f"{stmt.module}.{alias.name}" if stmt.module else alias.name
                    value = self.import_module(nested, stmt.level, stmt)
                else:
                    value = self.bound_value(value, stmt, alias.name)
            elif isinstance(source, Library):
                value = self.library_member(source, alias.name, stmt)
            elif alias.name == self.case_class_name:
                value = self.outside_case_class(stmt)
            else:
                nested = f"{stmt.module}.{alias.name}" if stmt.module else alias.name
                found = self.find_file(nested, stmt.level)
                value = self.import_module(nested, stmt.level, stmt) if found is not None else ABSENT
                if value is ABSENT and stmt.level == 0 and getattr(source, "harmless", False):
                    value = self.unknown_attribute(source, alias.name, stmt)
                elif value is ABSENT:
                    value = self.unknown(
                        stmt, self._import_text(stmt, alias.name), dotted=f"{stmt.module}.{alias.name}"
                    )
            self.bind(alias.asname or alias.name, value)

    @staticmethod
    def _import_text(stmt: ast.ImportFrom, name: str) -> str:
        return f"`{name}` is imported from `{'.' * stmt.level}{stmt.module or ''}`, which isn't a file of this tree"

    def import_star(self, source: Value, stmt: ast.ImportFrom) -> None:
        if isinstance(source, Module):
            names = source.ns.vars.get("__all__", ABSENT)
            listed = (
                self.sequence(names, stmt)
                if names is not ABSENT
                else [n for n in source.ns.vars if not n.startswith("_")]
            )
            if all(isinstance(n, str) for n in listed):
                for n in listed:
                    value = source.ns.vars.get(n, ABSENT)
                    if value is ABSENT:
                        raise PyRaise(AttributeError, stmt, n)
                    self.bind(n, value)
                return
        elif isinstance(source, Library) or getattr(source, "harmless", False):
            self.star_import = self.site(stmt)
            return
        self.star_import = self.site(stmt)
        self.report(self.site(stmt), "a star import that can't be followed could define or replace any list")

    def import_module(self, name: str, level: int, stmt: ast.stmt) -> Value:
        if level == 0:
            top = name.split(".")[0]
            if name in LIBRARIES:
                return Library(name)
            if top in sys.stdlib_module_names or top in HARMLESS:
                if top not in SAFE_IMPORTS:
                    self.may_raise(stmt, self.text(stmt))
                return self.unknown(stmt, f"module {name} isn't evaluated", harmless=top in HARMLESS, dotted=name)
        self.may_raise(stmt, self.text(stmt))
        path = self.find_file(name, level)
        if path is None:
            return self.unknown(stmt, f"module `{'.' * level}{name}` isn't a file of this tree", dotted=name)
        return self.follow(path, stmt)

    def follow(self, path: Path, stmt: ast.stmt) -> Value:
        key = str(path.resolve())
        if key in self.modules:
            return self.modules[key]
        if len(self.modules) >= MAX_MODULES:
            raise LimitReachedError(f"more than {MAX_MODULES} files are imported")
        if self.segments:
            return self.follow_under_condition(path, stmt)
        return self.load(path, key, stmt)

    def follow_under_condition(self, path: Path, stmt: ast.stmt) -> Value:
        """A first import in a branch: run outside every branch, as its own state belongs to none of them."""
        segments, outer, depth = self.segments, self.path, self.try_depth
        self.segments, self.path, self.try_depth = [], 1, 0
        try:
            return self.load(path, str(path.resolve()), stmt)
        finally:
            self.segments, self.path, self.try_depth = segments, outer, depth

    def load(self, path: Path, key: str, stmt: ast.stmt) -> Value:
        try:
            text = read_source(path)
            tree = parse_source(text, str(path))
        except (OSError, SourceError) as e:
            return self.unknown(stmt, f"{path} can't be read: {e}")
        module = self.modules[key] = self.new_module(str(path), path.stem, text)
        saved = (self.depth, self.try_depth, self.star_import, self.yields)
        self.depth, self.try_depth, self.star_import, self.yields = 0, 0, None, []
        try:
            self.run_in(Env("module", module.ns, None, module), tree.body)
        except PyRaise as e:
            self.report(self.site(stmt), f"the imported file {path.name} raises {e.describe()}")
        finally:
            self.depth, self.try_depth, self.star_import, self.yields = saved
        return module

    def find_file(self, name: str, level: int) -> Path | None:
        """The file of a module: relative to the importing file, else in its folder or one above, up to the root."""
        here = Path(self.module.path)
        if self.module.path == "<config>":
            return None
        parts = [p for p in name.split(".") if p]
        try:
            folder = here.resolve().parent
            if level:
                for _ in range(level - 1):
                    folder = folder.parent
                return self._file_in(folder, parts)
            for base in self._search_path(folder):
                found = self._file_in(base, parts)
                if found is not None:
                    return found
        except (OSError, ValueError):
            return None
        return None

    def _search_path(self, folder: Path) -> list[Path]:
        root = self.root.resolve() if self.root is not None else self._tree_root(folder)
        out = [folder]
        while out[-1] != root and out[-1].parent != out[-1]:
            out.append(out[-1].parent)
        return [*out, root / "src", root / "python"]

    @staticmethod
    def _tree_root(folder: Path) -> Path:
        """The repository's root if there is one, else the folder above the outermost package."""
        for base in (folder, *folder.parents):
            if (base / ".git").exists():
                return base
        while (folder / "__init__.py").exists() and folder.parent != folder:
            folder = folder.parent
        return folder

    @staticmethod
    def _file_in(folder: Path, parts: list[str]) -> Path | None:
        base = folder.joinpath(*parts)
        if parts and base.with_name(base.name + ".py").is_file():
            return base.with_name(base.name + ".py")
        if (base / "__init__.py").is_file():
            return base / "__init__.py"
        return None
