"""Random test-case configs for the differential test: every form the parser knows, nested in each other.

`generate(rng)` gives the text of a module; `rng` is a `random.Random` or hypothesis' stand-in for one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

HEADER = """\
import copy
import enum
import functools
import itertools
from dataclasses import dataclass, field, replace
from platform_stub import DiffusionTestCase as C, flag0, flag1, flag2, count, fails
"""
LISTS = ("ONE_GPU_CASES", "TWO_GPU_CASES")


@dataclass
class Scope:
    """Names usable at a point of the module, by what they hold."""

    lists: list[str] = field(default_factory=list)
    cases: list[str] = field(default_factory=list)
    strings: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # lists or tuples of strings
    ints: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    one: list[str] = field(default_factory=list)  # str -> case
    many: list[str] = field(default_factory=list)  # () -> list or generator of cases
    maps: list[str] = field(default_factory=list)  # list -> list
    mutators: list[str] = field(default_factory=list)  # list -> None
    dicts: list[str] = field(default_factory=list)  # str -> str
    boxes: list[str] = field(default_factory=list)  # str -> case
    in_loop: bool = False
    in_function: bool = False

    def child(self, **changes: bool) -> Scope:
        copied = {k: list(v) if isinstance(v, list) else v for k, v in vars(self).items()}
        copied.update(changes)
        return Scope(**copied)


class Generator:
    """Writes one module."""

    def __init__(self, rng: Random, *, unresolved: float) -> None:
        self.rng = rng
        self.unresolved = unresolved
        self.serial = 0

    def fresh(self, prefix: str) -> str:
        self.serial += 1
        return f"{prefix}{self.serial}"

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def pick(self, items: list[str]) -> str:
        return items[self.rng.randrange(len(items))]

    # -- expressions -----------------------------------------------------------------------------------------------

    def string(self, s: Scope, depth: int = 0) -> str:
        """An expression that gives a string."""
        forms = [lambda: f'"{self.fresh("k")}"'] * 4
        if s.strings:
            forms += [lambda: self.pick(s.strings)] * 2 + [lambda: f'f"{{{self.pick(s.strings)}}}_{self.fresh("f")}"']
        if s.names:
            forms.append(lambda: f"{self.pick(s.names)}[{self.rng.randrange(-1, 2)}]")
        if s.dicts:
            forms += [
                lambda: f'{self.pick(s.dicts)}["{self.pick(["p", "q"])}"]',
                lambda: f'{self.pick(s.dicts)}.get("zz", "{self.fresh("g")}")',
            ]
        if s.cases:
            forms.append(lambda: f'{self.pick(s.cases)}.id + "_{self.fresh("s")}"')
        if s.ints:
            forms += [
                lambda: f'f"n{{{self.pick(s.ints)}:02d}}_{self.fresh("f")}"',
                lambda: f'"m%d_%s" % ({self.pick(s.ints)}, "{self.fresh("p")}")',
            ]
        if depth < 2:
            forms += [
                lambda: f"{self.string(s, depth + 1)} + {self.string(s, depth + 1)}",
                lambda: f'"{{}}-{{x}}".format({self.string(s, depth + 1)}, x={self.string(s, depth + 1)})',
                lambda: f'"%s_%s" % ({self.string(s, depth + 1)}, {self.rng.randrange(9)})',
                lambda: f'"_".join([{self.string(s, depth + 1)}, "z"])',
                lambda: f"{self.string(s, depth + 1)}.upper()",
                lambda: f"({self.string(s, depth + 1)} if {self.cond(s)} else {self.string(s, depth + 1)})",
                lambda: f'(lambda a, b="{self.fresh("d")}": a + b)({self.string(s, depth + 1)})',
            ]
        return self.rng.choice(forms)()

    def cond(self, s: Scope, depth: int = 0) -> str:
        """A condition; unknown ones come from the stub's flags."""
        forms = [lambda: self.pick(["flag0()", "flag1()", "flag2()", "count() > 1", "not flag0()"])] * 3
        forms += [lambda: self.pick(["True", "False", "1 < 2", '"a" in "abc"', "not []"])] * 4
        if s.flags:
            forms += [lambda: self.pick(s.flags), lambda: f"not {self.pick(s.flags)}"]
        if s.lists:
            forms += [lambda: f"len({self.pick(s.lists)}) > {self.rng.randrange(4)}", lambda: self.pick(s.lists)]
            forms.append(lambda: f'any(c.id.startswith("k") for c in {self.pick(s.lists)})')
        if s.ints:
            forms.append(lambda: f"{self.pick(s.ints)} % 2 == 0")
        if s.strings and s.names:
            forms.append(lambda: f"{self.pick(s.strings)} in {self.pick(s.names)}")
        if s.cases:
            forms.append(lambda: f'{self.pick(s.cases)}.id != "k1"')
        if depth < 2:
            forms.append(lambda: f"({self.cond(s, depth + 1)} {self.pick(['and', 'or'])} {self.cond(s, depth + 1)})")
        return self.rng.choice(forms)()

    def case(self, s: Scope, depth: int = 0) -> str:
        """An expression that gives a case."""
        forms = [
            lambda: f"C({self.string(s)})",
            lambda: f"C({self.string(s)}, {self.rng.randrange(4)})",
            lambda: f"C(id={self.string(s)}, gpus={self.rng.randrange(4)})",
        ] * 2
        if s.cases:
            forms += [
                lambda: self.pick(s.cases),
                lambda: f"replace({self.pick(s.cases)}, id={self.string(s)})",
                lambda: f"replace({self.pick(s.cases)}, gpus=7)",
                lambda: f"copy.copy({self.pick(s.cases)})",
            ]
        if s.one:
            forms += [lambda: f"{self.pick(s.one)}({self.string(s)})"] * 3
        if s.lists:
            forms += [
                lambda: f"{self.pick(s.lists)}[{self.rng.randrange(-2, 2)}]",
                lambda: f"replace({self.pick(s.lists)}[0], id={self.string(s)})",
                lambda: f"max({self.pick(s.lists)}, key=lambda c: c.id)",
                lambda: f"next(iter({self.pick(s.lists)}), C({self.string(s)}))",
            ]
        if s.boxes:
            forms.append(lambda: f'{self.pick(s.boxes)}["a"]')
        if depth < 2:
            forms += [
                lambda: f"({self.case(s, depth + 1)} if {self.cond(s)} else {self.case(s, depth + 1)})",
                lambda: f'(lambda n: C(n + "_{self.fresh("l")}"))({self.string(s)})',
                lambda: f"functools.partial(C, {self.string(s)})(gpus=3)",
                lambda: f'C(**{{"id": {self.string(s)}, "gpus": 2}})',
            ]
        return self.rng.choice(forms)()

    def listing(self, s: Scope, depth: int = 0) -> str:
        """An expression that gives a new list of cases."""

        def sub() -> str:
            return self.pick(s.lists) if s.lists and self.chance(0.6) else self.listing(s, depth + 1)

        forms = [
            lambda: f"[{', '.join(self.case(s) for _ in range(self.rng.randrange(4)))}]",
            lambda: f"[{self.case(s)}, {self.case(s)}]",
        ] * 2
        forms.append(lambda: f'[C(f"r{{i}}_{self.fresh("i")}") for i in range({self.rng.randrange(4)})]')
        if s.names:
            tag = self.fresh("c")
            forms += [
                lambda: f'[C(f"{{n}}_{tag}") for n in {self.pick(s.names)}]',
                lambda: f'[C(f"{{n}}_{{i}}_{tag}") for i, n in enumerate({self.pick(s.names)}) if {self.cond(s)}]',
                lambda: f'[C("-".join(p) + "{tag}") for p in itertools.product({self.pick(s.names)}, ("x", "y"))]',
                lambda: f'[C(a + b + "{tag}") for a in {self.pick(s.names)} for b in ("1", "2") if a != b]',
            ]
        if s.dicts:
            forms.append(lambda: f'[C(f"{{k}}_{{v}}_{self.fresh("d")}") for k, v in {self.pick(s.dicts)}.items()]')
        if s.many:
            forms += [lambda: f"list({self.pick(s.many)}())", lambda: f"[*{self.pick(s.many)}(), {self.case(s)}]"] * 2
        if s.boxes:
            forms.append(lambda: f"list({self.pick(s.boxes)}.values())")
        if depth < 2:
            forms += [
                lambda: f"{sub()} + {sub()}",
                lambda: f"[*{sub()}, *{sub()}]",
                lambda: f"list({sub()})",
                lambda: f"{sub()}[:]",
                lambda: f"{sub()}[{self.rng.randrange(3)}:]",
                lambda: f"{sub()}[:{self.rng.randrange(-1, 3)}]",
                lambda: f"sorted({sub()}, key=lambda c: c.id)",
                lambda: f"list(reversed({sub()}))",
                lambda: f'[c for c in {sub()} if c.id not in ("k1", "k3", "k5")]',
                lambda: f'list(filter(lambda c: not c.id.endswith("2"), {sub()}))',
                lambda: f'list(map(lambda c: replace(c, id=c.id + "_{self.fresh("m")}"), {sub()}))',
                lambda: f"[replace(c, gpus=2) for c in {sub()}]",
                lambda: f'[replace(c, id=f"{{c.id}}_{self.fresh("t")}") for c in {sub()} if {self.cond(s)}]',
                lambda: f"list(itertools.chain({sub()}, {sub()}))",
                lambda: f"copy.deepcopy({sub()})",
                lambda: f"({sub()} if {self.cond(s)} else {sub()})",
                lambda: f"[c for c in {sub()} if {self.cond(s)}]",
                lambda: f"sum([{sub()}, {sub()}], [])",
                lambda: f"({sub()} or {sub()})",
                lambda: (
                    f'[replace(c, id=c.id + n) for c, n in zip({sub()}, ("_{self.fresh("h")}", "_{self.fresh("h")}"))]'
                ),
                lambda: f'[replace(c, id=f"{{c.id}}_{{i}}_{self.fresh("e")}") for i, c in enumerate({sub()})]',
            ]
            if s.maps:
                forms += [lambda: f"{self.pick(s.maps)}({sub()})"] * 3
        return self.rng.choice(forms)()

    # -- statements ------------------------------------------------------------------------------------------------

    def change(self, s: Scope) -> list[str]:
        """A statement that changes a list."""
        x = self.pick(s.lists)
        forms = [
            lambda: [f"{x}.append({self.case(s)})"],
            lambda: [f"{x}.append({self.case(s)})"],
            lambda: [f"{x}.extend({self.listing(s)})"],
            lambda: [f"{x} += {self.listing(s)}"] if not s.in_function else [f"{x}.extend({self.listing(s)})"],
            lambda: [f"{x}.insert({self.rng.randrange(-2, 4)}, {self.case(s)})"],
            lambda: [f"if {x}:", f"    {x}.pop({self.pick(['', '0', '-1'])})"],
            lambda: [f"if {x}:", f"    {x}.remove({x}[{self.pick(['0', '-1'])}])"],
            lambda: [f"if {x}:", f"    del {x}[{self.pick(['0', '-1'])}]"],
            lambda: [f"del {x}[{self.pick(['1:', ':1', '1:3', '-1:'])}]"],
            lambda: [f"{x}[:] = {self.listing(s)}"],
            lambda: [f"{x}[:0] = {self.listing(s)}"],
            lambda: [f"if {x}:", f"    {x}[0] = {self.case(s)}"],
            lambda: [f"{x}.sort(key=lambda c: c.id{self.pick(['', '[::-1]'])})"],
            lambda: [f"{x}.reverse()"],
            lambda: [f"{x}.extend(c for c in {self.listing(s)} if {self.cond(s)})"],
            lambda: [f"for c in list({x}):", '    if c.id.endswith("3"):', f"        {x}.remove(c)"],
            lambda: [f"for c in {x}:", f'    c.id = c.id + "_{self.fresh("w")}"'],
        ]
        if self.chance(0.06):
            forms = [lambda: [f"{x}.clear()"]]
        if s.mutators:
            forms += [lambda: [f"{self.pick(s.mutators)}({x})"]] * 3
        return self.rng.choice(forms)()

    def block(self, s: Scope, depth: int, low: int = 1, high: int = 3) -> list[str]:
        out: list[str] = []
        for _ in range(self.rng.randrange(low, high + 1)):
            out += self.statement(s, depth)
        return out or ["pass"]

    @staticmethod
    def indent(lines: list[str]) -> list[str]:
        return ["    " + line for line in lines]

    def statement(self, s: Scope, depth: int = 0) -> list[str]:
        if self.chance(self.unresolved):
            return self.unresolved_statement(s)
        forms = [self.change] * 6 + [self.define_case, self.define_list, self.define_scalar, self.alias]
        if depth < 3:
            forms += [lambda s: self.if_statement(s, depth)] * 3 + [lambda s: self.for_statement(s, depth)] * 2
            forms += [lambda s: self.try_statement(s, depth), lambda s: self.while_statement(s, depth)]
            forms += [lambda s: self.match_statement(s, depth), lambda s: self.with_statement(s, depth)]
        if depth == 0 or (depth < 2 and s.in_function):
            forms += [lambda s: self.define_function(s, depth)] * 4
        if depth == 0:
            forms += [self.define_class, self.unpack, self.box]
        return self.rng.choice(forms)(s)

    def define_case(self, s: Scope) -> list[str]:
        expr = self.case(s)
        name = self.fresh("case_")
        s.cases.append(name)
        return [f"{name} = {expr}"]

    def define_list(self, s: Scope) -> list[str]:
        expr = self.listing(s)
        name = self.fresh("list_")
        if not s.in_function and self.chance(0.35):
            name = self.pick(list(LISTS))
            if name not in s.lists:
                s.lists.append(name)
            return [f"{name}{self.pick(['', ': list[C]'])} = {expr}"]
        s.lists.append(name)
        return [f"{name} = {expr}"]

    def define_scalar(self, s: Scope) -> list[str]:
        kind = self.rng.randrange(5)
        if kind == 0:
            expr, name = self.string(s), self.fresh("text_")
            s.strings.append(name)
        elif kind == 1:
            expr, name = f"({self.string(s)}, {self.string(s)})", self.fresh("names_")
            s.names.append(name)
        elif kind == 2:
            expr, name = (
                f"len({self.pick(s.lists)})" if s.lists and self.chance(0.5) else str(self.rng.randrange(5)),
                self.fresh("int_"),
            )
            s.ints.append(name)
        elif kind == 3:
            expr, name = self.cond(s), self.fresh("flag_")
            s.flags.append(name)
        else:
            expr, name = f'{{"p": {self.string(s)}, "q": {self.string(s)}}}', self.fresh("dict_")
            s.dicts.append(name)
        return [f"{name} = {expr}"]

    def alias(self, s: Scope) -> list[str]:
        source, name = self.pick(s.lists), self.fresh("alias_")
        s.lists.append(name)
        if self.chance(0.2):
            return [f"{name} = {source} if {self.cond(s)} else {self.pick(s.lists)}"]
        return [f"{name} = {source}"]

    def unpack(self, s: Scope) -> list[str]:
        a, b = self.fresh("case_"), self.fresh("case_")
        form = self.rng.randrange(4)
        if form == 0:
            lines = [f"{a}, {b} = {self.case(s)}, {self.case(s)}"]
        elif form == 1:
            rest = self.fresh("list_")
            lines = [f"{a}, *{rest} = [{self.case(s)}, *{self.listing(s)}]", f"{b} = {a}"]
            s.lists.append(rest)
        elif form == 2:
            lines = [f"{a} = {b} = {self.case(s)}"]
        else:
            lines = [
                f"{self.pick(s.lists)}.append({a} := {self.case(s)})",
                f"({b}, text_{a}) = (copy.copy({a}), {self.string(s)})",
            ]
        s.cases += [a, b]
        return lines

    def box(self, s: Scope) -> list[str]:
        name = self.fresh("box_")
        s.boxes.append(name)
        lines = [f'{name} = {{"a": {self.case(s)}, "b": {self.case(s)}}}']
        if self.chance(0.5):
            lines.append(f'{name}["{self.pick(["a", "c"])}"] = {self.case(s)}')
        if self.chance(0.3):
            lines += [f"if {self.cond(s)}:", f'    {name}["d"] = {self.case(s)}']
        return lines

    def if_statement(self, s: Scope, depth: int) -> list[str]:
        lines = [f"if {self.cond(s)}:", *self.indent(self.body(s, depth))]
        if self.chance(0.25):
            lines += [f"elif {self.cond(s)}:", *self.indent(self.body(s, depth))]
        if self.chance(0.5):
            lines += ["else:", *self.indent(self.body(s, depth))]
        return lines

    def body(self, s: Scope, depth: int) -> list[str]:
        inner = s.child()
        lines = self.block(inner, depth + 1)
        if s.in_loop and self.chance(0.25):
            lines.append(self.pick(["break", "continue"]))
        return lines

    def for_statement(self, s: Scope, depth: int) -> list[str]:
        inner = s.child(in_loop=True)
        var = self.fresh("v")
        form = self.rng.randrange(7)
        if form == 0 and s.names:
            head = f"for {var} in {self.pick(s.names)}:"
            inner.strings.append(var)
        elif form == 1:
            head = f"for {var} in range({self.rng.randrange(4)}):"
            inner.ints.append(var)
        elif form == 2 and s.lists:
            head = f"for {var} in list({self.pick(s.lists)}):"
            inner.cases.append(var)
        elif form == 3 and s.names:
            head = f"for {var}i, {var} in enumerate({self.pick(s.names)}, {self.rng.randrange(2)}):"
            inner.strings.append(var)
            inner.ints.append(f"{var}i")
        elif form == 4 and s.dicts:
            head = f"for {var}k, {var} in {self.pick(s.dicts)}.items():"
            inner.strings += [var, f"{var}k"]
        elif form == 5 and s.many:
            head = f"for {var} in {self.pick(s.many)}():"
            inner.cases.append(var)
        else:
            head = f'for {var}, {var}n in zip(("{self.fresh("z")}", "{self.fresh("z")}"), (1, 2)):'
            inner.strings.append(var)
            inner.ints.append(f"{var}n")
        lines = [head, *self.indent(self.body(inner, depth))]
        if self.chance(0.15):
            lines += ["else:", *self.indent(self.block(s.child(), depth + 1, 1, 1))]
        return lines

    def while_statement(self, s: Scope, depth: int) -> list[str]:
        n = self.fresh("n")
        inner = s.child(in_loop=True)
        inner.ints.append(n)
        test = f"{n} < {self.rng.randrange(4)}" + (f" and {self.cond(s)}" if self.chance(0.15) else "")
        return [f"{n} = 0", f"while {test}:", f"    {n} += 1", *self.indent(self.body(inner, depth))]

    def try_statement(self, s: Scope, depth: int) -> list[str]:
        form = self.rng.randrange(4)
        if form == 0:
            module = self.pick(["optional0", "optional1"])
            body, kind = [f"import {module}", *self.block(s.child(), depth + 1, 1, 2)], "ImportError"
        elif form == 1:
            body, kind = (
                ["fails()", *self.block(s.child(), depth + 1, 1, 2)],
                self.pick(["ValueError", "Exception", "(KeyError, ValueError)"]),
            )
            if self.chance(0.5):
                body = body[1:] + body[:1]
        elif form == 2:
            body, kind = [*self.block(s.child(), depth + 1, 1, 2), 'dict(a=1)["b"]'], "KeyError"
        else:
            body, kind = (
                [f"if {self.cond(s)}:", '    raise ValueError("no")', *self.block(s.child(), depth + 1, 1, 2)],
                "ValueError",
            )
        lines = ["try:", *self.indent(body), f"except {kind}:", *self.indent(self.body(s, depth))]
        if self.chance(0.3):
            lines += ["else:", *self.indent(self.block(s.child(), depth + 1, 1, 1))]
        if self.chance(0.3):
            lines += ["finally:", *self.indent(self.block(s.child(), depth + 1, 1, 1))]
        return lines

    def with_statement(self, s: Scope, depth: int) -> list[str]:
        return ["with open('/dev/null') as handle:", *self.indent(self.body(s, depth))]

    def match_statement(self, s: Scope, depth: int) -> list[str]:
        subject = self.pick(s.strings) if s.strings and self.chance(0.5) else self.pick(['"p"', "count()", "2"])
        lines = [f"match {subject}:"]
        for pattern in (self.pick(['"p"', "1", '"k1" | "k2"']), self.pick(["2", "_", "captured"])):
            guard = f" if {self.cond(s)}" if pattern == "captured" else ""
            lines += [f"    case {pattern}{guard}:", *self.indent(self.indent(self.body(s, depth)))]
        return lines

    def define_class(self, s: Scope) -> list[str]:
        name = self.fresh("Kind")
        form = self.rng.randrange(5)
        if form == 0:
            s.strings += [f"{name}.A", f"{name}.B"]
            return [f"class {name}:", f'    A = "{self.fresh("a")}"', '    B = A + "_b"']
        if form == 1:
            s.strings += [f"{name}.A.value", f"{name}.B.name"]
            s.names.append(f"[m.value for m in {name}]")
            return [f"class {name}(enum.Enum):", f'    A = "{self.fresh("a")}"', f'    B = "{self.fresh("b")}"']
        if form == 2:
            s.one.append(f'{name}("{self.fresh("o")}").make')
            return [
                f"class {name}:",
                "    def __init__(self, prefix):",
                "        self.prefix = prefix",
                "    def make(self, n):",
                '        return C(f"{self.prefix}_{n}")',
            ]
        if form == 3:
            s.one.append(f"{name}.make")
            return [
                f"class {name}:",
                "    @staticmethod",
                "    def make(n, gpus=1):",
                f'        return C(n + "_{self.fresh("q")}", gpus)',
            ]
        s.one.append(f"(lambda n: {name}(n).case())")
        return [
            "@dataclass",
            f"class {name}:",
            "    n: str",
            "    tags: list = field(default_factory=list)",
            "    def case(self):",
            f'        self.tags.append("{self.fresh("t")}")',
            '        return C("_".join([self.n, *self.tags]))',
        ]

    def define_function(self, s: Scope, depth: int) -> list[str]:
        name = self.fresh("f_")
        form = self.rng.randrange(9)
        inner = s.child(in_function=True, in_loop=False)
        inner.lists = [x for x in inner.lists if not self.chance(0.3)]
        decorate = ["@functools.cache"] if form == 0 and depth == 0 and self.chance(0.1) else []
        if form in (0, 1):
            inner.strings.append("name")
            body = self.indent(self.block(inner.child(), depth + 2, 0, 1)) if self.chance(0.4) and inner.lists else []
            if self.chance(0.5):
                body += [f"    if {self.cond(inner)}:", f"        return {self.case(inner)}"]
            if self.chance(0.5):
                body += [f"    made = {self.case(inner)}", "    return made"]
            else:
                body += [f"    return {self.case(inner)}"]
            s.one.append(name)
            return [*decorate, f"def {name}(name, gpus=1, *rest, **more):", *body]
        if form in (2, 3):
            inner.lists.append("out")
            s.many.append(name)
            lines = [
                f"def {name}():",
                f"    out = {self.listing(inner)}",
                *self.indent(self.block(inner.child(), depth + 1, 1, 2)),
            ]
            if self.chance(0.3):
                lines += [f"    if {self.cond(inner)}:", f"        return {self.listing(inner)}"]
            return [*lines, "    return out"]
        if form == 4:
            s.many.append(name)
            lines = [f"def {name}():", f"    yield {self.case(inner)}"]
            if self.chance(0.5):
                lines += [f"    if {self.cond(inner)}:", f"        yield {self.case(inner)}"]
            if self.chance(0.5):
                lines += [f"    yield from {self.listing(inner)}"]
            if inner.names:
                lines += [f"    for n in {self.pick(inner.names)}:", f'        yield C(n + "_{self.fresh("y")}")']
            return lines
        if form == 5:
            s.maps.append(name)
            inner.lists.append("cases")
            kind = self.rng.randrange(3)
            if kind == 0:
                return [
                    f"def {name}(cases):",
                    f'    return [replace(c, id=c.id + "_{self.fresh("x")}") for c in cases if {self.cond(inner)}]',
                ]
            if kind == 1:
                inner.cases.append("c")
                return [
                    f"def {name}(cases, n=2):",
                    "    out = []",
                    "    for c in cases:",
                    f"        if {self.cond(inner)}:",
                    "            continue",
                    f"        out.append({self.case(inner)})",
                    "    return out",
                ]
            return [f"def {name}(cases):", *self.indent(self.change(inner)), f"    return {self.listing(inner)}"]
        if form == 6:
            s.mutators.append(name)
            inner.lists.append("target")
            lines = [f"def {name}(target, extra=()):"]
            if self.chance(0.3):
                lines += [f"    if {self.cond(inner)}:", "        return"]
            return [*lines, *self.indent(self.block(inner, depth + 1, 1, 2))]
        if form == 7:
            shadow = self.pick(list(LISTS))
            lines = [
                f"def {name}():",
                f"    {shadow} = []",
                f"    {shadow}.append({self.case(s)})",
                f"    return {shadow}",
            ]
            if self.chance(0.5):
                s.many.append(name)
            return lines
        if s.lists:
            target = self.pick(list(LISTS))
            lines = [f"def {name}():", f"    global {target}", f"    {target} = {self.listing(inner)}"]
            if self.chance(0.7):
                lines.append(f"{name}()")
            return lines
        return ["pass"]

    def unresolved_statement(self, s: Scope) -> list[str]:
        x = self.pick(s.lists)
        forms = [
            [f"import outside; outside.mutate({x})"],
            [f"from outside import transform; {x} = transform({x})"] if not s.in_function else ["pass"],
            [f"from outside import names; {x}.extend([C(n) for n in names()])"],
            [f"from outside import make; {x}.append(make({self.string(s)}))"],
            [f"import outside; {x}.append(C(outside.text()))"],
            [f"import outside; outside.keep(lambda: {x}.append({self.case(s)}))"],
            [f'exec("{x}.append(C(\\"{self.fresh("exec")}\\"))")'],
            ["import outside", "@outside.decorate", f"def {self.fresh('u_')}():", f"    {x}.append({self.case(s)})"],
            ["import outside", "for m in outside.names():", *self.indent(self.block(s.child(in_loop=True), 2, 1, 1))],
            [f'globals()["{self.pick(list(LISTS))}"].append({self.case(s)})'],
            [f"import outside; outside.held = {x}; outside.mutate_held()"],
            ["import outside", f"while outside.more(): {x}.append({self.case(s)})"],
            [f"import outside; del {x}[outside.zero():]"],
        ]
        return self.rng.choice(forms)


def generate(rng: Random, *, unresolved: float = 0.0, statements: int | None = None) -> str:
    """A module. `unresolved`: share of statements that no parser can resolve."""
    g = Generator(rng, unresolved=unresolved)
    s = Scope(lists=list(LISTS), flags=[], names=["NAMES"], dicts=["IDS"], ints=["N"])
    lines = ['NAMES = ["na", "nb"]', 'IDS = {"p": "ip", "q": "iq"}', "N = 2"]
    for name in LISTS:
        lines.append(
            f"{name}{g.pick(['', ': list[C]'])} = [{', '.join(g.case(Scope()) for _ in range(rng.randrange(4)))}]"
        )
    for _ in range(statements if statements is not None else rng.randrange(2, 9)):
        lines += g.statement(s)
    return HEADER + "\n".join(lines) + "\n"
