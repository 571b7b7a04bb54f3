"""Pipelines as text, options, and how passes speak."""

from __future__ import annotations

import inspect

import pytest

from sparsec.diagnostics import CompileError
from sparsec.passes import PASSES, options, parse_pipeline, print_pipeline
from sparsec.passes.raise_route import RaiseRoute


def test_a_pipeline_is_read_and_printed() -> None:
    text = "canonicalize,cse,raise-route{max-ops=8},dce"
    passes = parse_pipeline(text)
    assert passes[2] == RaiseRoute(max_ops=8)
    assert print_pipeline(passes) == text
    assert parse_pipeline(" canonicalize , cse ") == parse_pipeline("canonicalize,cse")


def test_options_at_their_default_are_not_printed() -> None:
    assert print_pipeline(parse_pipeline("raise-route{max-ops=64}")) == "raise-route"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("canonicalise", r"there is no pass 'canonicalise'; did you mean 'canonicalize'\?"),
        ("raise-route{max-op=3}", r"pass 'raise-route' has no option 'max-op'; did you mean 'max-ops'\?"),
        ("raise-route{max-ops=many}", r"option raise-route\{max-ops\} needs a int, not 'many'"),
        ("cse dce", "cannot read the pipeline from 'cse dce' on"),
        ("cse{", "cannot read the pipeline"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        parse_pipeline(text)


@pytest.mark.parametrize("name", sorted(PASSES))
def test_every_pass_and_option_is_documented(name: str) -> None:
    cls = PASSES[name]
    assert len(inspect.getdoc(cls) or "") > 40
    assert cls.name == name == name.lower()
    for option in options(cls):
        assert option.doc, f"{name}{{{option.name}}} lacks a `#:` comment"


def test_options_tell_type_default_and_meaning() -> None:
    (option,) = options(RaiseRoute)
    assert (option.name, option.type, option.default) == ("max-ops", "int", "64")
    assert "stays as it is" in option.doc
