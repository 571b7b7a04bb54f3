"""The two-line change that makes a line of the user's traceable, as code for that line."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass

_EXPERTS = "num_experts"


@dataclass(frozen=True)
class Change:
    """What stands there, what to write, and why; lines without the indentation that they share."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    why: str

    @property
    def excerpt(self) -> str:
        """As a diff shows it."""
        return "\n".join([*(f"- {line}" for line in self.before), *(f"+ {line}" for line in self.after)])


def change(lines: list[str]) -> Change | None:
    """The change for the statement that starts in the first of `lines`, which go on to the end of the file."""
    block = _statement(lines)
    if not block:
        return None
    head = block[0]
    if head.startswith("for "):
        return _loop(head)
    if head.startswith(("if ", "elif ")):
        return _branch(block, lines)
    if head.startswith("while "):
        return _while(head)
    return _expression(block)


def _statement(lines: list[str]) -> list[str]:
    """The first line and what is indented below it, less the indentation of the first."""
    if not lines:
        return []
    indent = len(lines[0]) - len(lines[0].lstrip())
    block = [lines[0].rstrip()[indent:]]
    for line in lines[1:]:
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        block.append(line.rstrip()[indent:])
    while block and not block[-1]:
        block.pop()
    return block


def _loop(head: str) -> Change | None:
    found = re.match(r"for (?P<target>.+?) in (?P<over>.+):", head)
    if found is None:
        return None
    target = re.sub(r"\W*,\W*$", "", found["target"])
    name = target.split(",")[-1].strip() if "enumerate(" in found["over"] else target
    return Change(
        (head,),
        (f"for {name} in range({_EXPERTS}):",),
        f"a loop over all experts is the same, an expert without tokens adds nothing; `{name}` is a number then",
    )


_EMPTY = re.compile(
    r"\.any\(\)|\.numel\(\)|len\(|\.shape\[|\.size\(|\.sum\(\)|\bcounts?\b|> 0|>0|== 0|==0|\.nelement\("
)


def _branch(block: list[str], lines: list[str]) -> Change | None:
    head, body = block[0], block[1:]
    following = next((line.strip() for line in lines[len(block) :] if line.strip()), "")
    if not _EMPTY.search(head) or following.startswith(("else", "elif")):
        return None
    why = "an expert without tokens gives an empty tensor, which adds nothing"
    if re.search(r":\s*(continue|pass)\b", head) or [line.strip() for line in body] in (["continue"], ["pass"]):
        return Change(tuple(block), (), f"leave the test out: {why}")
    inner = len(body[0]) - len(body[0].lstrip()) if body else 0
    return Change(tuple(block[:6]), tuple(line[inner:] for line in body[:5]), f"leave the test out: {why}")


def _while(head: str) -> Change:
    return Change(
        (head,),
        ("for _ in range(max_steps):",),
        "the number of steps must be known: take as many as ever needed, and keep what is finished by torch.where",
    )


def _expression(block: list[str]) -> Change | None:
    """Replace calls whose result has a size or a value that depends on data."""
    for count in range(1, min(len(block), 8) + 1):
        try:
            tree = ast.parse("\n".join(block[:count]))
        except SyntaxError:
            continue
        said: list[str] = []
        new = _Calls(said.append).visit(tree)
        if not said:
            return None
        return Change(tuple(block[:count]), tuple(ast.unparse(new).splitlines()), "; ".join(dict.fromkeys(said)))
    return None


class _Calls(ast.NodeTransformer):
    """Calls that need values, by calls that do not."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        name, base = _called(node)
        if name == "bincount" and node.args:
            classes = next((word.value for word in node.keywords if word.arg == "minlength"), ast.Name(_EXPERTS))
            self.say("one_hot(...).sum(0) counts the same, and its length is known")
            return _expr("F.one_hot(ids, classes).sum(0)", ids=node.args[0], classes=classes)
        if name == "one_hot" and len(node.args) + len(node.keywords) == 1:
            self.say("without a number of classes, the width of the result depends on the values")
            node.args.append(ast.Name(_EXPERTS))
            return node
        if name == "from_numpy" and node.args:
            return node.args[0]
        if name == "numpy" and base is not None:
            self.say("numpy computes outside of the graph: torch does the same inside of it")
            return _on_device(base)
        if isinstance(base, ast.Name) and base.id in ("np", "numpy") and isinstance(node.func, ast.Attribute):
            self.say("numpy computes outside of the graph: torch does the same inside of it")
            base.id = "torch"
            return self.visit_Call(node) if name == "bincount" else node
        if name == "int" and node.args and ast.unparse(node.args[0]) == _EXPERTS:
            return node.args[0]
        if name in ("item", "int") and re.search(r"\.(max|amax)\(", ast.unparse(node)):
            self.say("the largest number chosen is known at run time only; the number of experts bounds it")
            return ast.Name(_EXPERTS)
        return node


def _called(node: ast.Call) -> tuple[str, ast.expr | None]:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr, node.func.value
    return (node.func.id, None) if isinstance(node.func, ast.Name) else ("", None)


def _on_device(value: ast.expr) -> ast.expr:
    """`x` of `x.detach().cpu()`."""
    while (
        isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in ("cpu", "detach")
    ):
        value = value.func.value
    return value


def _expr(text: str, **parts: ast.expr) -> ast.expr:
    class Names(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return parts.get(node.id, node)

    return Names().visit(ast.parse(text, mode="eval").body)  # type: ignore[no-any-return]


def exact_classes(lines: list[str]) -> Change | None:
    """The change for `F.one_hot(x, n)` where `n` is a size: torch then takes the size for a number."""
    block = _statement(lines)[:1]
    try:
        tree = ast.parse("\n".join(block))
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _called(node)[0] == "one_hot" and node.args:
            classes = [*node.args[1:], *(word.value for word in node.keywords)]
            if len(classes) != 1:
                continue
            old, x, n = (ast.unparse(part) for part in (node, node.args[0], classes[0]))
            new = f"({x}.unsqueeze(-1) == torch.arange({n}, device={x}.device)).long()"
            return Change((block[0],), (block[0].replace(old, new),), "a comparison keeps the number of classes open")
    return None
