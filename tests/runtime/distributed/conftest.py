from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from tests.runtime.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four ranks as 2 nodes x 2, for all tests."""
    if not dist.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    ranks = Ranks()
    yield ranks
    ranks.close()
