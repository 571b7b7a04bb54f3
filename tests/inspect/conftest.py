"""What tests of pages share."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.inspect.browser import Browser, browser, find


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Generator[Browser]:
    """A browser without a window; skips where there is none."""
    if find() is None:
        pytest.skip("there is no Chromium")
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found
