"""The text of a condition: a sum of products over tests, without what follows from the rest."""

from __future__ import annotations

import re

Cube = frozenset[tuple[str, bool]]
_MAX_CUBES, _MAX_ATOMS, _MAX_TEXT = 24, 10, 160
_EQUALS = re.compile(r"^(.*) == ('[^']*'|-?[\d.]+|None|True|False)$", re.DOTALL)


def _primes(cubes: set[Cube]) -> set[Cube]:
    """The prime implicants, by consensus and absorption, as far as there are few."""
    work, done = set(cubes), False
    while not done and len(work) <= 8 * _MAX_CUBES:
        done = True
        for a in sorted(work, key=lambda c: (len(c), sorted(c))):
            for b in work:
                opposite = [k for k, v in a if (k, not v) in b]
                new = frozenset((k, v) for k, v in a | b if k not in opposite)
                if len(opposite) == 1 and not any(c <= new for c in work):
                    work, done = {c for c in work if not new <= c} | {new}, False
                    break
            if not done:
                break
    return work


def _covered(cube: Cube, others: set[Cube]) -> bool:
    """Whether `others` hold wherever `cube` does."""
    left = [o - cube for o in others if not any((k, not v) in cube for k, v in o)]
    if not left or not all(left):
        return bool(left)
    key = min(sorted(left, key=lambda c: (len(c), sorted(c)))[0])[0]
    return all(_covered(cube | {(key, v)}, others) for v in (False, True))


def _given(cube: Cube, texts: dict[str, str]) -> Cube:
    """Without ``not x == 'b'`` beside ``x == 'a'``."""
    parts = {k: m.groups() for k, _ in cube if (m := _EQUALS.match(texts.get(k, k)))}
    equal = {parts[k][0] for k, v in cube if v and k in parts}
    return frozenset((k, v) for k, v in cube if v or k not in parts or parts[k][0] not in equal)


def _literal(text: str, value: bool) -> str:
    text = text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."
    loose = re.search(" and | or ", text)
    if not value and text.endswith(" succeeds"):
        return f"{text.removesuffix('succeeds')}raises"
    return ("" if value else "not ") + (f"({text})" if loose else text)


def describe(cubes: set[Cube], texts: dict[str, str], order: dict[str, int]) -> str | None:
    """Text of the sum of `cubes` over decision keys; None where it always holds. `order`: of the tests in a product."""
    work = {_given(c, texts) for c in cubes}
    work = _primes(work) if len(work) <= 4 * _MAX_CUBES else work
    if len(work) <= _MAX_CUBES and len({k for c in work for k, _ in c}) <= _MAX_ATOMS:
        for cube in sorted(work, key=lambda c: (-len(c), sorted(c))):
            work = work - {cube} if _covered(cube, work - {cube}) else work
    if frozenset() in work or not work:
        return None if work else "conditions that weren't told apart"
    atoms = sorted({k for c in work for k, _ in c}, key=lambda k: order.get(k, 0))
    if len(work) > 6 or len(atoms) > _MAX_ATOMS:
        return f"a combination of {len(atoms)} conditions, the first: {_literal(texts.get(atoms[0], atoms[0]), True)}"
    products = []
    for cube in sorted(work, key=lambda c: (min(order.get(k, 0) for k, _ in c), len(c), sorted(c))):
        ordered = sorted(cube, key=lambda kv: order.get(kv[0], 0))
        products.append(" and ".join(_literal(texts.get(k, k), v) for k, v in ordered))
    return " or ".join(f"({p})" if len(products) > 1 and " and " in p else p for p in products)
