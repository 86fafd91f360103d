"""Reads PTX: entries with their parameters, shared variables, registers, labels and instructions."""

import re
from collections import ChainMap
from typing import NamedTuple

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", re.S)
TOKEN = re.compile(r"\s*(?:([\w$]+):(?!:)|(\{)|(\})|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)")  # label, braces, statement
OPERAND = re.compile(r"\{[^}]*\}|\[(?:[^\[\]]|\[[^\]]*\])*\]|[^,\s]+")
ADDRESS = re.compile(r"\[\s*([^\s,+\]]+)(?:\s*\+\s*(-?\w+))?\s*(?:,\s*(\{.*\}))?\s*\]", re.S)


class Fault(Exception):
    """What the kernel did wrong, or what this interpreter does not know."""


class Address(NamedTuple):
    base: str | int
    offset: int
    coordinates: tuple = ()  # in a tensor map: column, row


class Instruction(NamedTuple):
    guard: str  # "", "%p1" or "!%p1"
    opcode: str
    operands: tuple  # a register's name, a number's bits, Address, or a tuple of these
    text: str


class Entry(NamedTuple):
    code: list
    labels: dict
    registers: dict  # name -> bytes, 0 for a predicate
    parameter_bytes: int
    static_shared: int
    most_threads: int


def aligned(at, to):
    return -(-at // to) * to


def _layout(text, space):
    """Offsets of a space's variables and their bytes; what has no size, dynamic shared memory, comes last."""
    places, at = {}, 0
    found = re.findall(rf"\.{space} (?:\.align (\d+) )?\.[a-z]+(\d+) ([\w$]+)(\[\d*\])?", text)
    for align, bits, name, count in sorted(found, key=lambda variable: variable[3] == "[]"):
        size = int(bits) // 8
        places[name] = at = aligned(at, int(align or size))
        at += 0 if count == "[]" else size * int(count[1:-1] or 1)
    return places, at


class Module:
    """An entry is read when it is first asked for: a file of 42 kernels takes 3 s."""

    def __init__(self, text):
        self.text = COMMENT.sub("", text)
        heads = list(ENTRY.finditer(self.text))
        ends = [head.start() for head in heads[1:]] + [len(self.text)]
        self.places = {head[1]: (head, end) for head, end in zip(heads, ends)}
        self.before = self.text[: heads[0].start()]
        self.entries, self.programs = {}, {}

    def entry(self, name):
        if name not in self.entries:
            head, end = self.places[name]
            parameters, parameter_bytes = _layout(head[2], "param")
            shared, static = _layout(self.before + self.text[head.end() : end], "shared")
            threads = re.search(r"\.(?:maxntid|reqntid) (\d+)", head[3])
            body = _body(self.text, head.end(), parameters | shared)
            self.entries[name] = Entry(*body, parameter_bytes, static, int(threads[1]) if threads else 1024)
        return self.entries[name]


def _body(text, at, places):
    """Code, labels and registers. Braces, those of inline assembly too, are a scope of registers and labels."""
    tokens, registers, inside = [], {}, [ChainMap({"#": ""})]
    while inside:
        m = TOKEN.match(text, at)
        if m is None:
            raise Fault(f"cannot read the PTX at {text[at : at + 60]!r}")
        label, opens, closes, code = m.groups()
        at, names, code = m.end(), inside[-1], " ".join((code or "").split())
        if opens:
            inside.append(names.new_child({"#": f"#{at}"}))
        elif closes:
            inside.pop()
        elif label:
            names[label] = label + names["#"]
            tokens.append((names, label, True))
        elif code.startswith(".reg"):
            _, kind, declared = code.split(" ", 2)
            for name, count in re.findall(r"([%\w$]+)(?:<(\d+)>)?", declared):
                for each in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                    names[each] = each + names["#"]
                    registers[names[each]] = 0 if kind == ".pred" else int(kind[2:]) // 8
        elif not code.startswith("."):
            tokens.append((names, code, False))

    code, labels = [], {}
    for names, text, is_label in tokens:
        if is_label:
            labels[names[text]] = len(code)
        else:
            guard, opcode, rest = re.match(r"(?:@(\S+) )?(\S+) ?(.*)", text).groups()
            operands = tuple(_operand(each, names, places) for each in OPERAND.findall(rest))
            code.append(Instruction(guard and _operand(guard, names, places), opcode, operands, text))
    return code, labels, registers


def _operand(text, names, places):
    if text[0] == "{" or "|" in text:
        return tuple(_operand(each, names, places) for each in re.split(r"[\s,|]+", text.strip("{ }")))
    if text[0] == "[":
        base, offset, coordinates = ADDRESS.match(text).groups()
        coordinates = _operand(coordinates, names, places) if coordinates else ()
        return Address(_operand(base, names, places), int(offset or "0", 0), coordinates)
    if text[:2] in ("0f", "0d"):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(0[xX][\da-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    name = text.lstrip("!")
    return places[text] if text in places else text[: -len(name)] + names.get(name, name)
