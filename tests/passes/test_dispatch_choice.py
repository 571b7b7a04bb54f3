"""How tokens travel: the choice follows k, nodes and links."""

from __future__ import annotations

import pytest

from sparsec.passes.dispatch_choice import MESSAGE, Links, a_way, ways

ROW = 7168 * 2


def best(
    ranks: int, width: int, k: int, tokens: int = 4096, inside: float = 450e9, outside: float = 50e9
) -> tuple[str, str]:
    way = ways(Links(ranks, width, inside, outside), k, ROW, tokens)[0]
    return way.dedup, way.algo


def test_one_choice_has_nothing_to_share() -> None:
    assert best(8, 8, k=1) == ("none", "flat")


def test_inside_a_node_a_token_goes_once_to_each_rank() -> None:
    assert best(8, 8, k=8) == ("rank", "flat")


def test_over_a_slow_network_it_goes_once_to_each_node() -> None:
    assert best(64, 8, k=8) == ("node", "two_level")


def test_where_the_network_is_as_fast_two_hops_do_not_pay() -> None:
    assert best(64, 8, k=8, outside=450e9) == ("rank", "flat")


def test_few_tokens_save_messages() -> None:
    assert best(64, 8, k=8, tokens=1, outside=450e9)[1] == "two_level"


def test_a_token_of_one_node_ranks_sends_what_the_docstring_says() -> None:
    """2 nodes of 2, k = 2: (3/4)^2 of tokens miss a rank, (1/2)^2 a node."""
    links = Links(4, 2, 10e9, 1e9)
    flat = a_way(links, 2, ROW, 100, "rank", "flat")
    ranks, nodes = 4 * (1 - 0.75**2), 2 * (1 - 0.5**2)
    assert flat.outside == pytest.approx(100 * ranks / 2 * (ROW + 16))
    assert flat.seconds == pytest.approx(2 * (flat.outside / 1e9 + 3 * MESSAGE))
    two = a_way(links, 2, ROW, 100, "node", "two_level")
    assert two.outside == pytest.approx(100 * nodes / 2 * (ROW + 16))
    assert two.inside == pytest.approx(100 * ranks / 2 * (ROW + 16))
    assert two.seconds == pytest.approx(2 * (two.outside / 1e9 + two.inside / 10e9 + 2 * MESSAGE))


def test_the_fastest_comes_first() -> None:
    for k in (1, 2, 8):
        times = [way.seconds for way in ways(Links(32, 8, 450e9, 50e9), k, ROW, 128)]
        assert times == sorted(times) and len(times) == 4
