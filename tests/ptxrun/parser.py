"""PTX text -> syntax tree.

Scopes are resolved here: every register / local variable gets a name that is unique in its
function, and every label is resolved to the innermost enclosing scope that defines it.
"""

from __future__ import annotations
import re
from dataclasses import dataclass, field
from .errors import PtxParseError

_TOK = re.compile(
    r"""
   (?P<ws>[ \t\r\f]+) | (?P<nl>\n) | (?P<cm>//[^\n]*|/\*.*?\*/)
 | (?P<str>"(?:\\.|[^"\\])*")
 | (?P<num>0[fF][0-9a-fA-F]{8}(?![0-9a-fA-F])|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|0[bB][01]+U?
      |\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|\d+U?)
 | (?P<word>[A-Za-z_$%.][\w$%.]*(?:::[\w$.%]+)*)
 | (?P<p>[{}()\[\],;:|<>=+\-!@~*/&?^])
""",
    re.X | re.S,
)

TYPE_SIZE = {
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "tf32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "u16x2": 4,
    "s16x2": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "f32x2": 8,
    "b128": 16,
    "pred": 1,
    "texref": 8,
    "samplerref": 8,
    "surfref": 8,
}


@dataclass(frozen=True)
class Reg:
    name: str  # unique name in the function, or a special register (%tid.x ...)


@dataclass(frozen=True)
class Imm:
    value: object  # python int, or raw bits for kinds 'f' (f32) and 'd' (f64)
    kind: str = "i"  # 'i' | 'f' | 'd'


@dataclass(frozen=True)
class Sym:
    name: str
    off: int = 0


@dataclass(frozen=True)
class Addr:
    base: object  # Reg | Sym | Imm
    off: int = 0
    extra: tuple = ()  # further operands inside the brackets (tensor coordinates)


@dataclass(frozen=True)
class Vec:
    items: tuple


@dataclass(frozen=True)
class Pair:  # d|p
    a: object
    b: object


@dataclass(frozen=True)
class Not:  # !p
    a: object


@dataclass(frozen=True)
class Paren:
    items: tuple


@dataclass
class Instr:
    op: str  # first part of the opcode: 'ld'
    mods: tuple  # the others: ('global', 'v4', 'u32')
    ops: list
    pred: object = None  # (Reg, negated)
    line: int = 0
    text: str = ""
    src: str = ""

    @property
    def opcode(self):
        return ".".join((self.op,) + self.mods)


@dataclass
class Label:
    name: str


@dataclass
class Var:
    name: str
    space: str
    type: str
    size: int  # bytes; 0 for extern []
    align: int
    init: list = None  # list of Imm / Sym
    extern: bool = False


@dataclass
class Param:
    name: str
    type: str
    size: int
    align: int
    offset: int = 0


@dataclass
class Function:
    name: str
    entry: bool
    params: list
    rets: list
    body: list = field(default_factory=list)
    regs: dict = field(default_factory=dict)  # unique name -> type
    vars: dict = field(default_factory=dict)  # unique name -> Var (local/shared/param)
    tables: dict = field(default_factory=dict)  # branch tables
    directives: dict = field(default_factory=dict)
    has_body: bool = False


@dataclass
class ModuleAst:
    target: str = ""
    version: str = ""
    functions: dict = field(default_factory=dict)
    vars: dict = field(default_factory=dict)
    source: list = field(default_factory=list)


class _Scope:
    def __init__(self, parent, ident):
        self.parent, self.ident = parent, ident
        self.names, self.prefixes, self.labels = {}, {}, {}

    def find(self, name):
        s = self
        while s is not None:
            r = s.names.get(name)
            if r is not None:
                return r
            if s.prefixes:
                m = re.match(r"^(.*?)(\d+)$", name)
                if m:
                    p = m.group(1)
                    while True:
                        e = s.prefixes.get(p)
                        if e is not None and int(name[len(p) :] or -1) < e[0]:
                            return ("reg", e[1] + name[len(p) :], e[2])
                        # a prefix may itself end in digits (%rd1<4>)
                        if len(p) + 1 >= len(name):
                            break
                        p = name[: len(p) + 1]
            s = s.parent
        return None

    def label(self, name):
        s = self
        while s is not None:
            if name in s.labels:
                return s.labels[name]
            s = s.parent
        return None


def _int(t):
    t = t.rstrip("U")
    if t[:2] in ("0x", "0X"):
        return int(t, 16)
    if t[:2] in ("0b", "0B"):
        return int(t[2:], 2)
    if len(t) > 1 and t[0] == "0" and t.isdigit():
        return int(t, 8)
    return int(t)


def _num(t):
    if t[:2] in ("0f", "0F") and len(t) == 10:
        return Imm(int(t[2:], 16), "f")
    if t[:2] in ("0d", "0D") and len(t) == 18:
        return Imm(int(t[2:], 16), "d")
    if ("." in t or "e" in t or "E" in t) and not t.startswith(("0x", "0X")):
        import struct

        return Imm(int.from_bytes(struct.pack("<d", float(t)), "little"), "d")
    return Imm(_int(t), "i")


class Parser:
    def __init__(self, text):
        self.mod = ModuleAst(source=text.split("\n"))
        self.loc, self.files = {}, {}
        text = self._prepare(text)
        self._lex(text)
        self.i = 0

    # ---- lexing -------------------------------------------------------------------------
    def _prepare(self, text):
        def blank(m):
            return "\n" * m.group(0).count("\n")

        text = re.sub(r"\.section\s+[^\s{]+\s*\{[^}]*\}", blank, text)
        out, cur = [], None
        for n, ln in enumerate(text.split("\n"), 1):
            s = ln.lstrip()
            if s.startswith((".loc ", ".loc\t")):
                m = re.match(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)", s)
                if m:
                    cur = (int(m.group(1)), int(m.group(2)))
                ln = ""
            elif s.startswith((".file ", ".file\t")):
                m = re.match(r'\.file\s+(\d+)\s+"([^"]*)"', s)
                if m:
                    self.files[int(m.group(1))] = m.group(2).split("/")[-1]
                ln = ""
            elif s.startswith(".version"):
                self.mod.version, ln = s.split()[1], ""
            elif s.startswith(".target"):
                self.mod.target, ln = s.split(None, 1)[1].split("//")[0].strip(), ""
            elif s.startswith(".address_size"):
                ln = ""
            self.loc[n] = cur
            out.append(ln)
        return "\n".join(out)

    def _lex(self, text):
        toks, lines = [], []
        line, pos, n = 1, 0, len(text)
        match = _TOK.match
        while pos < n:
            m = match(text, pos)
            if m is None:
                raise PtxParseError(f"line {line}: cannot read {text[pos : pos + 30]!r}")
            k = m.lastgroup
            t = m.group(k)
            if k == "nl":
                line += 1
            elif k == "cm":
                line += t.count("\n")
            elif k != "ws":
                toks.append(t)
                lines.append(line)
            pos = m.end()
        toks.append("")
        lines.append(line)
        self.t, self.ln = toks, lines

    # ---- token helpers ---------------------------------------------------------------------
    def peek(self, k=0):
        return self.t[self.i + k] if self.i + k < len(self.t) else ""

    def next(self):
        t = self.t[self.i]
        self.i += 1
        return t

    def want(self, x):
        t = self.next()
        if t != x:
            raise PtxParseError(f"line {self.ln[self.i - 1]}: expected {x!r}, found {t!r}")

    def err(self, msg):
        raise PtxParseError(f"line {self.ln[min(self.i, len(self.ln) - 1)]}: {msg}")

    # ---- module ------------------------------------------------------------------------------
    def parse(self):
        while self.peek() != "":
            self._toplevel()
        return self.mod

    def _toplevel(self):
        extern = False
        while self.peek() in (".visible", ".weak", ".common", ".extern"):
            extern |= self.next() == ".extern"
        t = self.peek()
        if t in (".entry", ".func"):
            self._function(extern)
        elif t in (".global", ".const", ".shared"):
            for v in self._vardecl(extern):
                self.mod.vars[v.name] = v
        elif t in (".pragma", ".alias", ".attribute"):
            while self.next() != ";":
                pass
        elif t == ";" or (t.startswith("$") and self.peek(1) == ":"):
            self.next()
            if self.peek() == ":":
                self.next()
        else:
            self.err(f"unexpected {t!r} at module level")

    def _vardecl(self, extern=False):
        space = self.next()[1:]
        align, typ, vec = None, None, 1
        while self.peek().startswith("."):
            d = self.next()
            if d == ".align":
                align = _int(self.next())
            elif d == ".attribute":
                while self.next() != ")":
                    pass
            elif d in (".v2", ".v4"):
                vec = int(d[2:])
            elif d[1:] in TYPE_SIZE:
                typ = d[1:]
            elif d in (".ptr", ".global", ".shared", ".const", ".local"):
                pass
            else:
                self.err(f"unknown directive {d} in a variable declaration")
        es = TYPE_SIZE[typ] * vec
        out = []
        while True:
            name = self.next()
            n, is_array, open_ = 1, False, False
            while self.peek() == "[":
                self.next()
                is_array = True
                if self.peek() == "]":
                    open_ = True
                else:
                    n *= self._constexpr()
                self.want("]")
            init = None
            if self.peek() == "=":
                self.next()
                init = self._init()
                if open_:
                    n, open_ = len(init), False
            out.append(Var(name, space, typ, 0 if open_ else n * es, align or es, init, extern or open_))
            if self.peek() == ",":
                self.next()
                continue
            self.want(";")
            return out

    def _constexpr(self):
        v = _int(self.next())
        while self.peek() in ("*", "+", "-"):
            o, w = self.next(), _int(self.next())
            v = v * w if o == "*" else v + w if o == "+" else v - w
        return v

    def _init(self):
        if self.peek() == "{":
            self.next()
            out = []
            while self.peek() != "}":
                out += self._init()
                if self.peek() == ",":
                    self.next()
            self.next()
            return out
        return [self._init_value()]

    def _init_value(self):
        neg = False
        while self.peek() in ("-", "+"):
            neg ^= self.next() == "-"
        t = self.next()
        if t in ("generic", "mask"):
            self.want("(")
            v = self._init_value()
            while self.peek() != ")":
                self.next()
            self.want(")")
        elif t[0].isdigit():
            v = _num(t)
            if neg:
                v = Imm(-v.value if v.kind == "i" else v.value ^ (1 << (31 if v.kind == "f" else 63)), v.kind)
        else:
            v = Sym(t)
        if self.peek() in ("+", "-") and isinstance(v, Sym):
            o, w = self.next(), _int(self.next())
            v = Sym(v.name, v.off + (w if o == "+" else -w))
        return v

    # ---- functions -----------------------------------------------------------------------------
    def _params(self):
        self.want("(")
        out, off = [], 0
        while self.peek() != ")":
            kind = self.next()
            if kind not in (".param", ".reg"):
                self.err(f"expected .param, found {kind!r}")
            align, typ = None, None
            while self.peek().startswith(".") and self.peek() != "":
                d = self.next()
                if d == ".align":
                    a = _int(self.next())
                    align = a if typ is None else align
                elif d[1:] in TYPE_SIZE:
                    typ = d[1:]
            name = self.next()
            size = TYPE_SIZE[typ]
            if self.peek() == "[":
                self.next()
                size = size * (self._constexpr() if self.peek() != "]" else 0)
                self.want("]")
            al = align or TYPE_SIZE[typ]
            off = -(-off // al) * al
            out.append(Param(name, typ, size, al, off))
            off += size
            if self.peek() == ",":
                self.next()
        self.next()
        return out

    def _function(self, extern):
        entry = self.next() == ".entry"
        rets = []
        while self.peek() in (".noreturn", ".attribute"):
            if self.next() == ".attribute":
                while self.next() != ")":
                    pass
        if self.peek() == "(":
            rets = self._params()
        name = self.next()
        params = self._params() if self.peek() == "(" else []
        f = Function(name, entry, params, rets)
        while self.peek() not in ("{", ";"):
            d = self.next()
            vals = []
            while self.peek() not in ("{", ";") and not self.peek().startswith("."):
                vals.append(self.next())
            f.directives[d] = [int(v) for v in vals if v.isdigit()]
        old = self.mod.functions.get(name)
        if self.peek() == ";":
            self.next()
            if old is None:
                self.mod.functions[name] = f
            return
        f.has_body = True
        self.mod.functions[name] = f
        self._body(f)

    def _body(self, f):
        self.want("{")
        nscope = 0
        scope = _Scope(None, 0)
        for p in f.params + f.rets:
            scope.names[p.name] = ("param", p.name, p.type)
        pending = []  # (Instr, index of operand, name, scope)
        self._used_names = set(f.regs)
        while True:
            t = self.peek()
            if t == "":
                self.err("unexpected end of file in a function")
            if t == "{":
                self.next()
                nscope += 1
                scope = _Scope(scope, nscope)
            elif t == "}":
                self.next()
                scope = scope.parent
                if scope is None:
                    break
            elif t == ";":
                self.next()
            elif t in (".reg",):
                self._regdecl(f, scope)
            elif t in (".local", ".shared", ".param", ".global", ".const"):
                for v in self._vardecl():
                    u = v.name
                    if u in f.vars or (v.space == "param" and scope.ident):
                        u = f"{v.name}#{scope.ident}"
                    v.name, plain = u, v.name
                    f.vars[u] = v
                    scope.names[plain] = (v.space, u, v.type)
            elif t == ".pragma":
                while self.next() != ";":
                    pass
            elif t in (".branchtargets", ".calltargets", ".callprototype"):
                kind = self.next()
                items = []
                while self.peek() != ";":
                    items.append(self.next())
                self.next()
                last = f.body[-1] if f.body and isinstance(f.body[-1], Label) else None
                if kind == ".branchtargets" and last is not None:
                    names = [x for x in items if x != ","]
                    f.tables[last.name] = (names, scope)
            elif self.peek(1) == ":" and t not in ("@",):
                self.next()
                self.next()
                u = t if scope.ident == 0 else f"{t}#{scope.ident}"
                scope.labels[t] = u
                f.body.append(Label(u))
            else:
                ins = self._instr(f, scope)
                ins._scope = scope
                f.body.append(ins)
        # resolve branch targets now that all labels are known
        for ins in f.body:
            if isinstance(ins, Instr):
                if ins.op in ("bra", "brx"):
                    for k, o in enumerate(ins.ops):
                        if isinstance(o, Sym):
                            lab = ins._scope.label(o.name)
                            if lab is None:
                                raise PtxParseError(f"line {ins.line}: unknown label {o.name}")
                            ins.ops[k] = Sym(lab)
                del ins._scope
        for k, (names, sc) in list(f.tables.items()):
            f.tables[k] = [sc.label(n) for n in names]

    def _regdecl(self, f, scope):
        self.next()
        typ = self.next()[1:]
        if typ in ("v2", "v4"):
            self.err(".reg vectors are not supported")
        if typ not in TYPE_SIZE:
            self.err(f"unknown register type {typ}")
        while True:
            name = self.next()
            u = name if (name not in self._used_names and not scope.ident) else f"{name}#{scope.ident}"
            if self.peek() == "<":
                self.next()
                n = _int(self.next())
                self.want(">")
                scope.prefixes[name] = (n, u, typ)
            else:
                scope.names[name] = ("reg", u, typ)
            self._used_names.add(name)
            if self.peek() == ",":
                self.next()
                continue
            self.want(";")
            return

    def _name(self, f, scope, t):
        r = scope.find(t)
        if r is not None:
            if r[0] == "reg":
                if r[1] not in f.regs:
                    f.regs[r[1]] = r[2]
                return Reg(r[1])
            return Sym(r[1])
        if t.startswith("%"):
            return Reg(t)
        return Sym(t)

    def _instr(self, f, scope):
        start, line = self.i, self.ln[self.i]
        pred = None
        if self.peek() == "@":
            self.next()
            neg = False
            if self.peek() == "!":
                self.next()
                neg = True
            pred = (self._name(f, scope, self.next()), neg)
            line = self.ln[self.i]
        word = self.next()
        parts = [p for p in re.split(r"\.(?!$)", word) if p != ""]
        ops = []
        while self.peek() != ";":
            if self.peek() == "":
                self.err("unexpected end of file in an instruction")
            ops.append(self._operand(f, scope))
            if self.peek() == ",":
                self.next()
            elif self.peek() != ";":
                self.err(f"unexpected {self.peek()!r} in `{' '.join(self.t[start : self.i])}`")
        self.next()
        text = self._text(start, self.i - 1)
        loc = self.loc.get(line)
        src = f"{self.files.get(loc[0], loc[0])}:{loc[1]}" if loc else ""
        return Instr(parts[0], tuple(parts[1:]), ops, pred, line, text, src)

    def _text(self, a, b):
        s = " ".join(self.t[a:b])
        for x, y in (
            (" ,", ","),
            ("[ ", "["),
            (" ]", "]"),
            ("{ ", "{"),
            (" }", "}"),
            ("@ ", "@"),
            ("! ", "!"),
            (" | ", "|"),
        ):
            s = s.replace(x, y)
        return s

    def _operand(self, f, scope):
        t = self.peek()
        if t == "{":
            self.next()
            items = []
            while self.peek() != "}":
                items.append(self._operand(f, scope))
                if self.peek() == ",":
                    self.next()
            self.next()
            o = Vec(tuple(items))
            if self.peek() == "|":
                self.next()
                return Pair(o, self._operand(f, scope))
            return o
        if t == "(":
            self.next()
            items = []
            while self.peek() != ")":
                items.append(self._operand(f, scope))
                if self.peek() == ",":
                    self.next()
            self.next()
            return Paren(tuple(items))
        if t == "[":
            self.next()
            base, off, extra = self._operand(f, scope), 0, []
            if isinstance(base, Sym) and base.off:
                base, off = Sym(base.name), base.off
            while self.peek() in ("+", "-"):
                sgn = 1
                while self.peek() in ("+", "-"):
                    sgn *= -1 if self.next() == "-" else 1
                off += sgn * _int(self.next())
            while self.peek() == ",":
                self.next()
                extra.append(self._operand(f, scope))
            self.want("]")
            o = Addr(base, off, tuple(extra))
            return o
        if t == "!":
            self.next()
            return Not(self._operand(f, scope))
        if t in ("-", "+"):
            neg = False
            while self.peek() in ("-", "+"):
                neg ^= self.next() == "-"
            v = _num(self.next())
            if neg:
                v = Imm(-v.value if v.kind == "i" else v.value ^ (1 << (31 if v.kind == "f" else 63)), v.kind)
            return v
        self.next()
        if t[0].isdigit():
            return _num(t)
        o = self._name(f, scope, t)
        if self.peek() == "|":
            self.next()
            return Pair(o, self._operand(f, scope))
        if isinstance(o, Sym) and self.peek() in ("+", "-") and self.peek(1)[:1].isdigit():
            sgn = 1 if self.next() == "+" else -1
            o = Sym(o.name, sgn * _int(self.next()))
        return o


def parse(text) -> ModuleAst:
    return Parser(text).parse()
