"""The text of a condition: a sum of products over tests, without what follows from the rest."""

from __future__ import annotations

import re

Cube = frozenset[tuple[str, bool]]
_MAX_CUBES, _MAX_ATOMS = 24, 10
_EQUALS = re.compile(r"^(.*) == ('[^']*'|-?[\d.]+|None|True|False)$", re.DOTALL)


def _merge(cubes: set[Cube]) -> set[Cube]:
    """All prime implicants by consensus and absorption; `cubes` as they are where there are too many."""
    if len(cubes) > 4 * _MAX_CUBES:
        return cubes
    work = set(cubes)
    changed = True
    while changed and len(work) <= 8 * _MAX_CUBES:
        changed = False
        listed = sorted(work, key=lambda c: (len(c), sorted(c)))
        for i, a in enumerate(listed):
            for b in listed[i + 1 :]:
                opposite = [k for k, v in a if (k, not v) in b]
                if len(opposite) != 1:
                    continue
                new = frozenset((k, v) for k, v in a | b if k != opposite[0])
                if not any(c <= new for c in work):
                    work = {c for c in work if not new <= c} | {new}
                    changed = True
            if changed:
                break
    return work


def _covered(cube: Cube, others: set[Cube]) -> bool:
    """Whether `others` hold wherever `cube` does."""
    left = []
    for o in others:
        if any((k, not v) in cube for k, v in o):
            continue
        rest = o - cube
        if not rest:
            return True
        left.append(rest)
    if not left:
        return False
    key = min(sorted(left, key=len)[0])[0]
    return all(_covered(cube | {(key, v)}, others) for v in (False, True))


def simplify(cubes: set[Cube]) -> list[Cube]:
    """An irredundant sum of prime implicants."""
    work = _merge({c for c in cubes})
    if len(work) <= _MAX_CUBES and len({k for c in work for k, _ in c}) <= _MAX_ATOMS:
        for cube in sorted(work, key=lambda c: (-len(c), sorted(c))):
            if _covered(cube, work - {cube}):
                work.discard(cube)
    return sorted(work, key=lambda c: (len(c), sorted(c)))


def _implied(cube: Cube) -> Cube:
    """Without ``not x == 'b'`` beside ``x == 'a'``."""
    given = {m.group(1): m.group(2) for k, v in cube if v and (m := _EQUALS.match(k))}
    return frozenset(
        (k, v) for k, v in cube if v or not (m := _EQUALS.match(k)) or given.get(m.group(1), m.group(2)) == m.group(2)
    )


def _literal(key: str, value: bool, texts: dict[str, str]) -> str:
    text = texts.get(key, key)
    if value:
        return f"({text})" if " or " in text else text
    if text.endswith(" succeeds"):
        return text[: -len("succeeds")] + "raises"
    return f"not ({text})" if " and " in text or " or " in text else f"not {text}"


def describe(cubes: set[Cube], texts: dict[str, str], order: dict[str, int]) -> str | None:
    """Text of the sum of `cubes` over decision keys; None where it always holds. `order`: of the tests in a product."""
    sums = simplify({_implied(c) for c in cubes})
    if any(not c for c in sums):
        return None
    atoms = sorted({k for c in sums for k, _ in c}, key=lambda k: order.get(k, 0))
    if len(sums) > 6 or len(atoms) > _MAX_ATOMS:
        return f"a combination of {len(atoms)} conditions, the first: {texts.get(atoms[0], atoms[0])}"
    products = []
    for c in sorted(sums, key=lambda c: (min(order.get(k, 0) for k, _ in c), len(c), sorted(c))):
        literals = [_literal(k, v, texts) for k, v in sorted(c, key=lambda kv: order.get(kv[0], 0))]
        products.append(" and ".join(literals))
    return " or ".join(f"({p})" if len(products) > 1 and " and " in p else p for p in products)
