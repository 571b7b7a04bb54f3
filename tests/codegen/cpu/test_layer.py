"""Native kernels of whole layers against f64: every kind and size, any thread, any routing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsec.codegen.cpu import compiler
from sparsec.codegen.cpu.emit import emit_kernel
from tests.codegen.cpu.experts import HERE, Experts, Native, lowered, near, same

LAYERS = {
    "both biases": Experts("f32", 7, 33, 17, 3, up_bias=True, down_bias=True, ids="i32", scores="bf16"),
    "one part": Experts("bf16", 2, 100, 130, 1, parts=1),
    "tail, all experts": Experts("bf16", 3, 65, 47, 3, early=True, up_bias=True, tail=True),
    "one value": Experts("bf16", 1, 1, 1, 1),
    "router": Experts("bf16", 7, 40, 24, 2, router=True, scores="bf16", up_bias=True),
    "slices": Experts("bf16", 2, 48, 1700, 2, down_bias=True),
    "slices, f32": Experts("f32", 9, 20, 850, 2, parts=1),
    "int8": Experts("bf16", 4, 200, 72, 2, weights="int8", down_bias=True),
    "int8, slices": Experts("bf16", 2, 48, 1700, 2, weights="int8", parts=1),
    "int4, early": Experts("bf16", 4, 150, 260, 2, weights="int4", parts=1, early=True),
    "int4, slices": Experts("bf16", 9, 20, 1700, 2, weights="int4", ids="i32"),
    "int8 by int8, slices": Experts("bf16", 2, 20, 3300, 2, weights="int8", activations="int8", parts=1),
    "int4 by int8": Experts("bf16", 3, 70, 300, 2, weights="int4", activations="int8", down_bias=True, early=True),
}
TOKENS = (0, 1, 2, 15, 16, 17, 33, 300)
INT_MOST = {"i32": 2**31 - 1, "i64": 2**63 - 1}

pytestmark = pytest.mark.skipif(not HERE, reason="nothing here compiles native code that runs here")


@pytest.fixture(params=HERE)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def run_on(threads: int, native: Native, values: dict[str, Tensor]) -> list[Tensor]:
    torch.set_num_threads(threads)
    return native(values)


def skipping(layer: Experts, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with some ids out of range, and weights there that are no numbers."""
    ids, w = values["ids"].clone(), values["w"].clone()
    most = INT_MOST[layer.ids]
    for i, wrong in enumerate((layer.experts, -1, most, -most - 1)):
        ids[i::9, i % layer.k] = wrong
        w[i::9, i % layer.k] = torch.nan
    ids[7::11] = -1
    return {**values, "ids": ids, "w": w}


@pytest.mark.parametrize("name", LAYERS)
def test_results(name: str, isa: str) -> None:
    layer = LAYERS[name]
    banks = layer.drawn(0)
    native = Native(layer, isa, banks)
    for tokens in TOKENS:
        values = {**banks, **{key: value for key, value in layer.drawn(tokens, tokens).items() if key in layer.inputs}}
        if layer.router:
            y, ids, w, p = native(values)
            torch.testing.assert_close(p, values["logits"].float().softmax(1).to(p.dtype))
            assert torch.equal(w, p.topk(layer.k).values)
            assert torch.equal(w, p.gather(1, ids))
            near(layer, y, {**values, "ids": ids, "w": w})
            continue
        near(layer, native(values)[0], values)
        if tokens == 33:
            values = skipping(layer, values)
            near(layer, native(values)[0], values)
            assert bool((native(values)[0][7::11] == 0).all())


@pytest.mark.parametrize("name", [name for name in LAYERS if "slices" in name])
def test_slices_are_more_than_one(name: str) -> None:
    """What the other tests of these layers rest on."""
    source = emit_kernel(next(func for func in lowered(LAYERS[name]).funcs.values() if func.name.startswith("experts")))
    asked = f'{source}static_assert(Kernel::SLICES > 1, "one slice");\n'
    with tempfile.NamedTemporaryFile("w", suffix=".cpp") as file:
        file.write(asked)
        file.flush()
        status, text = compiler.run([*compiler.find().command, *compiler.flags("avx2"), "-fsyntax-only", file.name])
    assert status == 0, text


@pytest.mark.parametrize("name", ["both biases", "one part", "slices", "int4, slices", "int8 by int8, slices"])
def test_all_tokens_on_one_expert(name: str, isa: str) -> None:
    """More rows than go through both GEMMs at once; slots of a token may name one expert several times."""
    layer = LAYERS[name]
    values = layer.drawn(600)
    values["ids"].fill_(layer.experts - 1)
    native = Native(layer, isa, values)
    first = run_on(1, native, values)
    near(layer, first[0], values)
    for threads in (2, 7):
        assert same(run_on(threads, native, values), first)


@pytest.mark.parametrize(
    "name",
    ["both biases", "slices", "slices, f32", "int8, slices", "int4, slices", "int8 by int8, slices", "int4 by int8"],
)
def test_the_same_bits_on_any_number_of_threads(name: str, isa: str) -> None:
    """Cores share columns where chunks are few for their number, and take chunks alone where there are many."""
    layer = LAYERS[name]
    for tokens in (1, 30, 700):
        values = layer.drawn(tokens, seed=tokens)
        native = Native(layer, isa, values)
        first = run_on(1, native, values)
        for threads in (1, 2, 3, 7, 2 * (os.cpu_count() or 1) + 3):
            for _ in range(2):
                assert same(run_on(threads, native, values), first)


def test_programs_in_threads_at_once(isa: str) -> None:
    """Two models, each called by two Python threads, on any sizes in turn."""
    natives = {layer: Native(layer, isa, layer.drawn(0)) for layer in (LAYERS["both biases"], LAYERS["int4, early"])}
    inputs = {layer: [layer.drawn(tokens, seed=tokens) for tokens in (40, 1, 200, 7)] for layer in natives}
    wanted = {layer: [native(values) for values in inputs[layer]] for layer, native in natives.items()}

    def work(layer: Experts) -> bool:
        torch.set_num_threads(2)
        return all(
            same(natives[layer](values), results)
            for _ in range(15)
            for values, results in zip(inputs[layer], wanted[layer], strict=True)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, [*natives, *natives]))


@pytest.mark.parametrize(
    "name", ["both biases", "one part", "tail, all experts", "int4, early", "int8 by int8, slices"]
)
def test_what_is_no_number_stays_in_its_row(name: str, isa: str) -> None:
    layer = LAYERS[name]
    values = layer.drawn(50)
    native = Native(layer, isa, values)
    wanted = native(values)[0]
    x, hit = values["x"].clone(), torch.zeros(50, dtype=torch.bool)
    hit[[3, 20, 49]] = True
    x[3, 0], x[20, -1], x[49] = torch.nan, torch.inf, torch.nan
    got = native({**values, "x": x})[0]
    assert torch.equal(got[~hit], wanted[~hit])
    assert bool(got[hit].isnan().any(1).all())


@pytest.mark.parametrize("name", ["both biases", "int8", "int8 by int8, slices"])
def test_weights_of_skipped_pairs_do_not_count(name: str, isa: str) -> None:
    layer = LAYERS[name]
    drawn = layer.drawn(40)
    values = skipping(layer, drawn)
    native = Native(layer, isa, values)
    assert same(native(values), native({**values, "w": drawn["w"]}))


@st.composite
def layers(draw: st.DrawFn) -> Experts:
    """Layers of any kind and small size."""
    dtype, experts = draw(st.sampled_from(["f32", "bf16"])), draw(st.integers(1, 12))
    yes, sizes = st.booleans(), st.integers(1, 150)
    weights = draw(st.sampled_from(["model", "int8", "int4"])) if dtype == "bf16" else "model"
    return Experts(
        dtype, experts, draw(sizes), draw(sizes), draw(st.integers(1, experts)), draw(st.sampled_from([1, 2])),
        weights, draw(yes), draw(yes), draw(yes), draw(yes), False, draw(st.sampled_from(["i32", "i64"])),
        draw(st.sampled_from(["f32", "bf16"])),
    )  # fmt: skip


@settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(layer=layers(), tokens=st.lists(st.integers(0, 90), min_size=1, max_size=4), number=st.integers(0, 99))
def test_any_layer(layer: Experts, tokens: list[int], number: int) -> None:
    banks = layer.drawn(0, seed=number)
    native = Native(layer, HERE[number % len(HERE)], banks)
    for count in tokens:
        values = {**layer.drawn(count, seed=count), **{key: banks[key] for key in banks if key not in layer.inputs}}
        values = skipping(layer, values)
        near(layer, run_on(1 + number % 3, native, values)[0], values)
