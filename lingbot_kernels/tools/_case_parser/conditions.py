"""Conditions under which a case exists, as reduced ordered binary decision diagrams.

An atom is one test whose outcome isn't known without running the config; its text is kept for the reader.
"""

from __future__ import annotations

from .limits import LimitReachedError

Cond = int

NEVER: Cond = 0
ALWAYS: Cond = 1

_MAX_NODES = 30_000
_MAX_OPERATIONS = 500_000
_MAX_DESCRIBED_NODES = 300
_MAX_CUBES = 12
_MAX_COVER_STEPS = 2_000


class _TooManyProductsError(Exception):
    """A condition is too long to be written out."""


class Conditions:
    """Owner of the diagram nodes and of the atoms' texts; a condition is a node number."""

    def __init__(self) -> None:
        self._nodes: list[tuple[int, Cond, Cond]] = [(1 << 60, 0, 0), (1 << 60, 1, 1)]
        self._unique: dict[tuple[int, Cond, Cond], Cond] = {}
        self._memo: dict[tuple[Cond, Cond, Cond], Cond] = {}
        self._texts: list[tuple[str, str]] = []
        self._cover_steps = 0

    @property
    def count(self) -> int:
        """How many tests there are."""
        return len(self._texts)

    def atom(self, text: str, negated: str | None = None) -> Cond:
        """A new independent test, shown as `text` when it holds and as `negated` (default ``not text``) when not."""
        self._texts.append((text, f"not {text}" if negated is None else negated))
        return self._node(len(self._texts) - 1, ALWAYS, NEVER)

    def negate(self, c: Cond) -> Cond:
        return self._ite(c, NEVER, ALWAYS)

    def both(self, a: Cond, b: Cond) -> Cond:
        if a == ALWAYS or b == NEVER:
            return b
        if b == ALWAYS or a == NEVER:
            return a
        return self._ite(a, b, NEVER)

    def either(self, a: Cond, b: Cond) -> Cond:
        if a == NEVER or b == ALWAYS:
            return b
        if b == NEVER or a == ALWAYS:
            return a
        return self._ite(a, ALWAYS, b)

    def any_of(self, conds: list[Cond]) -> Cond:
        out = NEVER
        for c in conds:
            out = self.either(out, c)
        return out

    def excludes(self, a: Cond, b: Cond) -> bool:
        """Whether `a` and `b` can't hold together."""
        return self.both(a, b) == NEVER

    def implies(self, a: Cond, b: Cond) -> bool:
        return b == ALWAYS or a == NEVER or self.both(a, self.negate(b)) == NEVER

    def describe(self, c: Cond) -> str | None:
        """Python-like text of a condition: an irredundant sum of products; None for ALWAYS."""
        if c == ALWAYS:
            return None
        if c == NEVER:
            return "never"
        atoms = self._support(c)
        if atoms is None:
            return "a combination of many conditions"
        self._cover_steps = 0
        try:
            cubes, _ = self._cover(c, c)
        except _TooManyProductsError:
            cubes = []
        if not 0 < len(cubes) <= _MAX_CUBES:
            return f"a combination of {len(atoms)} conditions, the first: {self._texts[atoms[0]][0]}"
        texts = []
        for cube in cubes:
            literals = [self._texts[v][0 if positive else 1] for v, positive in sorted(cube.items())]
            literals = list(dict.fromkeys(literals))
            text = " and ".join(literals)
            texts.append(f"({text})" if len(cubes) > 1 and len(literals) > 1 else text)
        return " or ".join(dict.fromkeys(texts))

    def _support(self, c: Cond) -> list[int] | None:
        seen: set[Cond] = set()
        stack = [c]
        while stack:
            n = stack.pop()
            if n in (NEVER, ALWAYS) or n in seen:
                continue
            seen.add(n)
            if len(seen) > _MAX_DESCRIBED_NODES:
                return None
            stack.extend(self._nodes[n][1:])
        return sorted({self._nodes[n][0] for n in seen})

    def _node(self, var: int, high: Cond, low: Cond) -> Cond:
        if high == low:
            return high
        key = (var, high, low)
        found = self._unique.get(key)
        if found is None:
            if len(self._nodes) > _MAX_NODES:
                raise LimitReachedError("the conditions became too large to follow")
            found = self._unique[key] = len(self._nodes)
            self._nodes.append(key)
        return found

    def _cofactors(self, c: Cond, var: int) -> tuple[Cond, Cond]:
        top, high, low = self._nodes[c]
        return (high, low) if top == var else (c, c)

    def _ite(self, f: Cond, g: Cond, h: Cond) -> Cond:
        if f == ALWAYS or g == h:
            return g
        if f == NEVER:
            return h
        if g == ALWAYS and h == NEVER:
            return f
        key = (f, g, h)
        found = self._memo.get(key)
        if found is None:
            if len(self._memo) > _MAX_OPERATIONS:
                raise LimitReachedError("the conditions became too large to follow")
            var = min(self._nodes[f][0], self._nodes[g][0], self._nodes[h][0])
            f1, f0 = self._cofactors(f, var)
            g1, g0 = self._cofactors(g, var)
            h1, h0 = self._cofactors(h, var)
            found = self._memo[key] = self._node(var, self._ite(f1, g1, h1), self._ite(f0, g0, h0))
        return found

    def _cover(self, lower: Cond, upper: Cond) -> tuple[list[dict[int, bool]], Cond]:
        """Minato-Morreale: an irredundant set of products between `lower` and `upper`."""
        self._cover_steps += 1
        if self._cover_steps > _MAX_COVER_STEPS:
            raise _TooManyProductsError
        if lower == NEVER:
            return [], NEVER
        if upper == ALWAYS:
            return [{}], ALWAYS
        var = min(self._nodes[lower][0], self._nodes[upper][0])
        l1, l0 = self._cofactors(lower, var)
        u1, u0 = self._cofactors(upper, var)
        cubes0, f0 = self._cover(self.both(l0, self.negate(u1)), u0)
        cubes1, f1 = self._cover(self.both(l1, self.negate(u0)), u1)
        rest = self.either(self.both(l0, self.negate(f0)), self.both(l1, self.negate(f1)))
        cubes, fd = self._cover(rest, self.both(u0, u1))
        out = [{var: True, **c} for c in cubes1] + [{var: False, **c} for c in cubes0] + cubes
        return out, self._node(var, self.either(f1, fd), self.either(f0, fd))
