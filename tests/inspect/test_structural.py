"""The structural diff: silent on what makes no difference, exact on what does."""

from __future__ import annotations

import pytest

from sparsec import pipeline
from sparsec.inspect.structural import Change, compare
from sparsec.ir.core import Module
from sparsec.ir.equal import clone_module
from sparsec.ir.parser import parse_module
from tests.inspect.test_costs import LAYER


def changed(old: str, new: str, text: str = LAYER) -> list[Change]:
    """The differences after replacing a piece of the layer's text."""
    assert text.count(old) >= 1
    return compare(parse_module(text), parse_module(text.replace(old, new)))


@pytest.fixture
def module() -> Module:
    return parse_module(LAYER)


def test_copies_are_equal(module: Module) -> None:
    assert compare(module, clone_module(module)) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("%z", "%renamed"),
        ("%v = aten", 'loc "elsewhere.py":7\n  %v = aten'),
        (
            "moe.experts(%x, %ids, %weights, %up, %down)",
            'moe.experts(%x, %ids, %weights, %up, %down) {layout = "concat"}',
        ),
    ],
)
def test_names_places_and_defaults_do_not_show(old: str, new: str) -> None:
    assert changed(old, new) == []


def test_an_attribute() -> None:
    (change,) = changed("%v = aten.unsqueeze(%y) {dim = 1}", "%v = aten.unsqueeze(%y) {dim = -2}")
    assert (change.kind, change.what) == ("changed", ("attributes",))
    assert "dim = 1" in change.before and "dim = -2" in change.after


def test_an_op_inside_a_region() -> None:
    (change,) = changed("aten.silu", "aten.relu")
    assert change.what == ("regions",) and "aten.relu" in change.after


def test_an_operand() -> None:
    swapped = LAYER.replace("aten.mul.Tensor(%g, %b)", "aten.mul.Tensor(%b, %g)")
    (change,) = compare(parse_module(LAYER), parse_module(swapped))
    assert change.what == ("regions",)
    text = LAYER.replace(
        "%v = aten.unsqueeze(%y)", "%t = aten.sub.Tensor(%y, %x) : tensor<s0x64xbf16>\n  %v = aten.unsqueeze(%t)"
    )
    (change,) = changed("aten.sub.Tensor(%y, %x)", "aten.sub.Tensor(%x, %y)", text)
    assert (change.kind, change.what) == ("changed", ("operands",))


def test_added_and_removed() -> None:
    new = "%t = aten.neg(%y) : tensor<s0x64xbf16>\n  %v = aten.unsqueeze(%t)"
    (change,) = changed("%v = aten.unsqueeze(%y)", new)
    assert (change.kind, change.before) == ("added", "") and "aten.neg" in change.after
    back = compare(parse_module(LAYER.replace("%v = aten.unsqueeze(%y)", new)), parse_module(LAYER))
    assert [change.kind for change in back] == ["removed"]


def test_functions(module: Module) -> None:
    lowered = pipeline.run(clone_module(module), target="cuda:sm_90", start="raise").module
    renamed = clone_module(lowered)
    name = next(name for name in renamed.funcs if name != "main")
    func = renamed.funcs.pop(name)
    func.name = "renamed"
    renamed.funcs["renamed"] = func
    assert [change for change in compare(lowered, renamed) if change.what == ("function",)] == []
    del renamed.funcs["renamed"]
    assert [(c.kind, c.func) for c in compare(lowered, renamed)] == [("removed", name)]


def test_a_pass(module: Module) -> None:
    result = pipeline.run(module, target="cuda:sm_90", start="raise")
    changes = compare(result.ir("raise"), result.ir("fuse"))
    assert {"moe.route(", "moe.experts("} == {
        name for c in changes if c.kind == "removed" for name in ("moe.route(", "moe.experts(") if name in c.before
    }
    assert sum(c.kind == "added" for c in changes) == 3


def test_of_a_changed_op_only_its_changed_lines_are_marked() -> None:
    """A region shows once, with what went and what came where it stands."""
    other = parse_module(LAYER.replace("aten.silu", "aten.relu"))
    (change,) = compare(parse_module(LAYER), other)
    marked = [line.split() for line in str(change).splitlines() if line[:4] in ("  - ", "  + ")]
    assert [(words[0], words[3].partition("(")[0]) for words in marked] == [("-", "aten.silu"), ("+", "aten.relu")]
    assert len(str(change).splitlines()) > len(marked) + 2
