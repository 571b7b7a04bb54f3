"""docs/models.md is what docs/models.json says, and that is about every family and form."""

from __future__ import annotations

import json
from typing import Any

import pytest

from docs import support_matrix
from tests.zoo.families import FAMILIES
from tests.zoo.handwritten import FORMS


@pytest.fixture(scope="module")
def results() -> Any:
    return json.loads(support_matrix.RESULTS.read_text())


def test_the_page_is_fresh(results: Any) -> None:
    assert support_matrix.PAGE.read_text() == support_matrix.page(results), "run `python -m docs.support_matrix write`"


def test_every_family_and_form_was_run(results: Any) -> None:
    assert results["families"].keys() == FAMILIES.keys()
    assert results["forms"].keys() == FORMS.keys()
    for name, parts in results["families"].items():
        assert parts.keys() >= {"layers", "whole"}, name
        assert not [part for part in parts.values() if isinstance(part, dict) and "failed" in part], name


def test_a_process_that_dies_is_a_row_that_says_so() -> None:
    failed = {"failed": "not done after 600 seconds"}
    text = support_matrix.page({"families": {"some": {"layers": failed, "whole": failed}}, "forms": {"Some": failed}})
    assert text.count("not done after 600 seconds") == 3
