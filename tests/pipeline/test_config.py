"""Every knob: keyword before environment before default."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsec.config import Config, knobs
from sparsec.diagnostics import SparsecError


def test_order_of_precedence() -> None:
    environ = {"SPARSEC_TARGET": "cuda:sm_90", "SPARSEC_DUMP": "/d", "SPARSEC_VERIFY": "0"}
    assert Config.read({}) == Config()
    assert Config.read(environ) == Config("cuda:sm_90", Path("/d"), verify=False)
    assert Config.read(environ, target="cpu", dump=None) == Config("cpu", Path("/d"), verify=False)


def test_an_unreadable_variable_is_an_error() -> None:
    with pytest.raises(SparsecError, match="SPARSEC_VERIFY='maybe' is neither true nor false"):
        Config.read({"SPARSEC_VERIFY": "maybe"})
    with pytest.raises(SparsecError, match="SPARSEC_CHUNKS='two' is no number"):
        Config.read({"SPARSEC_CHUNKS": "two"})
    with pytest.raises(SparsecError, match="in at least one chunk, not in 0"):
        Config.read({"SPARSEC_CHUNKS": "0"})
    with pytest.raises(SparsecError, match="policy is one of static, local, batch, not 'best'"):
        Config.read({}, policy="best")


def test_every_knob_has_a_flag_a_variable_and_a_meaning() -> None:
    for knob in knobs():
        assert knob.flag == f"--{knob.name.replace('_', '-')}" and knob.env == f"SPARSEC_{knob.name.upper()}"
        assert len(knob.doc) > 20
