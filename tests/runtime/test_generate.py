"""Greedy generation, with a toy program whose next token is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsec.codegen.artifact import write_artifact
from sparsec.codegen.emit import emit
from sparsec.dialects.dtypes import from_torch
from sparsec.ir.core import Block, Func, Module
from sparsec.ir.types import Sym
from sparsec.runtime.errors import ArtifactError, InputError
from sparsec.runtime.executor import Program
from sparsec.runtime.generate import Generator
from tests.runtime.models import add, tensor_type

VOCABULARY, LENGTH = 11, 8


def counting_module(cached: bool) -> Module:
    """Predicts the sum of all tokens so far, modulo the vocabulary; with a cache that holds them by position."""
    s0, integers = Sym("s0"), torch.int64
    ids_type, flat_type = tensor_type(1, s0, dtype=integers), tensor_type(s0, dtype=integers)
    cache_type, scalar = tensor_type(LENGTH, dtype=integers), tensor_type(dtype=integers)
    types = [ids_type, tensor_type(1, dtype=integers), cache_type] if cached else [ids_type]
    block = Block(types, ["input_ids", "start", "cache"][: len(types)])
    tokens = add(block, "aten.reshape", [block.args[0]], [flat_type], shape=(-1,)).result
    if cached:
        count = add(block, "aten.arange", [], [flat_type], end=s0).result
        places = add(block, "aten.add.Tensor", [count, block.args[1]], [flat_type]).result
        tokens = add(block, "aten.index_copy", [block.args[2], places, tokens], [cache_type], dim=0).result
    total = add(block, "aten.sum", [tokens], [scalar]).result
    best = add(block, "aten.remainder.Scalar", [total], [scalar], other=VOCABULARY).result
    row = tensor_type(VOCABULARY)
    hot = add(block, "aten.one_hot", [best], [tensor_type(VOCABULARY, dtype=integers)], num_classes=VOCABULARY).result
    scores = add(block, "aten._to_copy", [hot], [row], dtype=from_torch(torch.float32)).result
    last = tensor_type(1, 1, VOCABULARY)
    logits = add(block, "aten.reshape", [scores], [last], shape=(1, 1, VOCABULARY)).result
    add(block, "func.return", [logits, tokens] if cached else [logits], ())
    main = Func("main", block)
    if cached:
        main.arg_attrs = {block.args[2]: {"kind": "buffer", "source": "cache"}}
        main.result_attrs = {1: {"kind": "mutation", "source": "cache"}}
    return Module([main], {"phase": "lower"})


def settings(cached: bool, **more: Any) -> dict[str, Any]:
    kind, inputs = ("static-cache", ["input_ids", "start"]) if cached else ("recompute", ["input_ids"])
    return {"kind": kind, "max_len": LENGTH, "batch": 1, "eos": [], "inputs": inputs} | more


def generator(cached: bool, **more: Any) -> Generator:
    weights = {"cache": torch.zeros(LENGTH, dtype=torch.int64)} if cached else {}
    return Generator(Program(emit(counting_module(cached), "cpu").plan, weights), settings(cached, **more))


@pytest.mark.parametrize("cached", [True, False])
def test_every_token_follows_from_all_before(cached: bool) -> None:
    made = generator(cached)
    for _ in range(2):  # the second run starts from an empty cache
        assert [token.id for token in made.stream([1, 2], 4)] == [3, 6, 1, 2]
    assert (made.stats.prompt_tokens, made.stats.new_tokens) == (2, 4)
    assert made.stats.tokens_per_second > 0


@pytest.mark.parametrize("cached", [True, False])
def test_it_ends_at_eos_and_at_the_last_position(cached: bool) -> None:
    assert [token.id for token in generator(cached, eos=[6]).stream([1, 2])] == [3, 6]
    assert len(list(generator(cached).stream([1, 2]))) == LENGTH - 2


@pytest.mark.parametrize(
    ("prompt", "new", "words"),
    [
        ([], 1, "the prompt has no tokens"),
        ([-1], 1, "token id -1"),
        ([1] * LENGTH, None, "8 tokens of prompt and 1 new ones are more than the 8 positions"),
        ([1, 2], 7, "2 tokens of prompt and 7 new ones are more than the 8 positions"),
        ("text", 1, "needs a tokenizer.json"),
    ],
)
def test_prompts_that_do_not_fit(prompt: Any, new: int | None, words: str) -> None:
    with pytest.raises(InputError) as error:
        generator(True).stream(prompt, new)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"kind": "magic"}, "names no kind of generation"),
        ({"inputs": ["tokens"]}, "not ['input_ids', 'start']"),
        ({"max_len": "long"}, "max_len is 'long'"),
        ({"eos": [None]}, "not a list of token ids"),
        ({"batch": 2}, "2 sequences at once"),
    ],
)
def test_settings_are_checked(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ArtifactError) as error:
        generator(True, **more)
    assert words in str(error.value)


def test_from_an_artifact_with_text(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    emitted = emit(counting_module(True), "cpu")
    weights = {"cache": torch.zeros(LENGTH, dtype=torch.int64)}
    more: dict[str, Any] = {"generation": settings(True), "tokenizer": tmp_path / "tokenizer.json"}
    path = write_artifact(tmp_path / "toy.sparsec", emitted, weights, target="cpu", **more)
    made = Generator.load(path)
    tokens = list(made.stream("w1 w2", 3))
    assert [token.id for token in tokens] == [3, 6, 1]
    assert "".join(token.text for token in tokens).split() == ["w3", "w6", "w1"]
    plain = write_artifact(tmp_path / "plain.sparsec", emitted, weights, target="cpu")
    with pytest.raises(ArtifactError, match=r"has no generation\.json"):
        Generator.load(plain)
