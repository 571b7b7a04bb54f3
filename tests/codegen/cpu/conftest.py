"""Layers that tests make are small: without this no kernel would wake a second thread for them."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from sparsec.codegen.cpu import emit
from sparsec.ir.core import Func


@pytest.fixture(autouse=True, scope="package")
def every_thread_is_woken() -> Generator[None]:
    original = emit.emit_kernel

    def eager(func: Func) -> str:
        return "#define SPARSEC_WAKING_US 1e-9\n" + original(func)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emit, "emit_kernel", eager)
        yield
