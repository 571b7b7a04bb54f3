"""A whole language model, compiled for four devices, on four ranks: the same numbers as one process gives."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import sparsec
from sparsec.inspect.info import info
from sparsec.passes.placement import Plan, parse_topology, write_plan
from sparsec.runtime import packing
from sparsec.runtime.artifact import load, open_artifact
from sparsec.runtime.distributed import World
from sparsec.runtime.errors import ArtifactError, InputError, RankError
from sparsec.runtime.executor import Program
from sparsec.runtime.generate import Generator
from sparsec.runtime.plan import Exchange
from tests.runtime.distributed.ranks import Ranks
from tests.ways_in.tiny import ids

transformers: Any = pytest.importorskip("transformers")

RANKS, SLOTS, EXPERTS, LAYERS = 4, 2, 6, 2
LENGTHS = (5, 1, 9, 3)  # tokens of each rank
PLACED = [[0, 1, 2, 3, 4, 5, 0, 3], [5, 0, 1, 2, 3, 4, 5, 1]]
MOVED = [[5, 4, 3, 2, 1, 0, 5, 4], [0, 5, 2, 1, 4, 3, 2, 1]]


def olmoe() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "vocab_size": 64}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    tokens: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    model = transformers.OlmoeForCausalLM(
        transformers.OlmoeConfig(**sizes, **tokens, num_experts=EXPERTS, num_experts_per_tok=2)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model.eval()


def placement(slots: list[list[int]], path: Path) -> Path:
    table = np.array(slots)
    split = np.stack([1 / np.bincount(row)[row] for row in table])
    write_plan(Plan(parse_topology("2x2"), tuple(range(LAYERS)), EXPERTS, (SLOTS,) * RANKS, table, split), path)
    return path


@pytest.fixture(scope="module")
def model() -> Any:
    return olmoe()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("olmoe")


@pytest.fixture(scope="module")
def artifact(model: Any, folder: Path) -> Path:
    plan = placement(PLACED, folder / "plan.json")
    compiled = sparsec.compile_language_model(model, devices="2x2", plan=plan, dispatch="rank")
    return compiled.save(folder / "rank")


@pytest.fixture(scope="module")
def wanted(model: Any) -> list[torch.Tensor]:
    """The logits after each rank's prompt, by transformers in one process."""
    with torch.no_grad():
        return [model(ids(1, length, rank)).logits[:, -1:] for rank, length in enumerate(LENGTHS)]


def logits_of(program: Any, rank: int) -> torch.Tensor:
    program.reset()
    (logits,) = program(ids(1, LENGTHS[rank], rank), torch.tensor([0]))
    return logits


def run_prompts(world: World, path: Path, resting: int = -1) -> torch.Tensor | None:
    """What a rank's own prompt gives; the rank `resting` has none."""
    program = load(path, world=world)
    logits = None if world.rank == resting else logits_of(program, world.rank)
    program.finish()
    return logits


def close(found: list[Any], wanted: list[torch.Tensor]) -> None:
    for rank, (mine, right) in enumerate(zip(found, wanted, strict=True)):
        assert mine is None or torch.allclose(mine, right, rtol=0, atol=1e-5), f"rank {rank}"


@pytest.mark.parametrize(
    ("dispatch", "policy", "chunks"), [("none", "static", 1), ("node", "local", 3), ("auto", "batch", 1)]
)
def test_every_way_to_send_gives_what_one_process_gives(
    ranks: Ranks, model: Any, folder: Path, wanted: list[torch.Tensor], dispatch: str, policy: str, chunks: int
) -> None:
    plan = placement(PLACED, folder / "plan.json")
    compiled = sparsec.compile_language_model(model, plan=plan, dispatch=dispatch, policy=policy, chunks=chunks)
    starts = sum(isinstance(s, Exchange) and s.op == "dispatch_start" for s in compiled.emitted.plan.steps)
    assert starts == LAYERS * chunks
    path = compiled.save(folder / f"{dispatch}-{policy}")
    close(ranks.run(run_prompts, path), wanted)
    close(ranks.run(run_prompts, path, 1), wanted)


def test_rows_in_fp8(ranks: Ranks, model: Any, folder: Path, wanted: list[torch.Tensor]) -> None:
    path = sparsec.compile_language_model(model, devices="2x2", payload="fp8").save(folder / "fp8")
    for rank, found in enumerate(ranks.run(run_prompts, path, 1)):
        if found is not None:
            error = (found - wanted[rank]).norm() / wanted[rank].norm()
            assert 1e-5 < error < 0.1, f"rank {rank}"


def test_a_world_of_other_nodes_is_refused(ranks: Ranks, model: Any, folder: Path) -> None:
    path = sparsec.compile_language_model(model, devices=4).save(folder / "one-node")
    assert all("World.of(width=4), or compile with --devices 2x2" in said for said in ranks.run(try_to_load, path))


def test_a_rank_without_a_prompt_takes_part(ranks: Ranks, artifact: Path, wanted: list[torch.Tensor]) -> None:
    found = ranks.run(run_prompts, artifact, 2)
    assert found[2] is None
    close(found, wanted)


def generate(world: World, path: Path, wanted: tuple[int, ...]) -> list[int]:
    generator = Generator.load(path, world=world)
    prompt = ids(1, LENGTHS[world.rank], world.rank)[0].tolist()
    tokens = [token.id for token in generator.stream(prompt, wanted[world.rank])]
    again: Any = generator.stream(prompt, 4)  # one that is left before its end
    assert next(again).id == tokens[0]
    again.close()
    return tokens


def test_ranks_generate_as_long_as_they_like(ranks: Ranks, artifact: Path, model: Any) -> None:
    lengths = (3, 7, 1, 4)
    for rank, found in enumerate(ranks.run(generate, artifact, lengths)):
        prompt = ids(1, LENGTHS[rank], rank)
        right = model.generate(prompt, max_new_tokens=lengths[rank], do_sample=False)[0, prompt.shape[1] :]
        assert found == right.tolist()


def bytes_held(world: World, path: Path) -> int:
    program = load(path, world=world)
    held = [value for value in program._runner.base if isinstance(value, torch.Tensor)]
    held += [weight for bank in program._context.banks.values() for weight in bank.weights]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def test_a_rank_has_its_own_experts_and_no_others(ranks: Ranks, artifact: Path, model: Any) -> None:
    opened = open_artifact(artifact)
    assert opened.plan.spread is not None and opened.manifest["ranks"] == RANKS
    local = opened.plan.local()
    assert len(local) == 2 * LAYERS
    for name in opened.manifest["files"]:
        if name.startswith("weights/"):
            with safe_open(artifact / name, framework="pt") as file:
                keys = set(file.keys())
            assert keys <= local if name.startswith("weights/ranks/") else not keys & local
    expert = 4 * 3 * 32 * 48
    whole = sum(parameter.numel() * 4 for parameter in model.parameters())
    without = whole - LAYERS * EXPERTS * expert
    for rank, held in enumerate(ranks.run(bytes_held, artifact)):
        # Tiles pad what is no multiple of them, and buffers come on top: still less than one more expert of each layer.
        assert held < without + LAYERS * (SLOTS + 1) * expert, f"rank {rank}"


def without_native_code(world: World, path: Path) -> Program:
    """A program whose banks oneDNN packs, small as they are."""
    artifact = open_artifact(path, rank=world.rank)
    kernels = {name: replace(kernel, binaries={}) for name, kernel in artifact.plan.kernels.items()}
    smallest = dict(packing.SMALLEST)
    packing.SMALLEST[4] = 0
    try:
        return Program(replace(artifact.plan, kernels=kernels), artifact.weights, world=world)
    finally:
        packing.SMALLEST.update(smallest)


def banks_of(program: Program) -> list[torch.Tensor]:
    slots = [arg.slot for arg in program.plan.args if arg.source in program.plan.local()]
    plain = [bank for slot in slots if (bank := program._runner.base[slot]) is not None]
    packed = [weight for bank in program._context.banks.values() for weight in bank.weights]
    return plain + [weight.to_dense() if weight.is_mkldnn else weight for weight in packed]


def replan_between_runs(
    world: World, path: Path, plans: list[Path], budget: int | None, native: bool
) -> list[torch.Tensor]:
    program = load(path, world=world) if native else without_native_code(world, path)
    fresh = load(path, world=world)
    first = [bank.clone() for bank in banks_of(program)]
    found = [logits_of(program, world.rank)]
    for plan in plans:
        for _ in program.replan(plan, budget_bytes=budget):
            found.append(logits_of(program, world.rank))
    found.append(logits_of(program, world.rank))
    same = [torch.equal(a, b) for a, b in zip(first, banks_of(program), strict=True)]
    assert all(same) == (plans[-1].name == "plan.json")
    found.append(logits_of(fresh, world.rank))  # the files are as they were
    return found


@pytest.mark.parametrize(("budget", "native"), [(None, True), (10_000, True), (None, False)])
def test_a_new_plan_while_it_runs(
    ranks: Ranks, artifact: Path, folder: Path, wanted: list[torch.Tensor], budget: int | None, native: bool
) -> None:
    plans = [placement(MOVED, folder / "moved.json"), placement(PLACED, folder / "plan.json")]
    for way in (plans[:1], plans):
        found = ranks.run(replan_between_runs, artifact, way, budget, native)
        assert all(len(each) > (3 if budget is None else 6) for each in found)
        for rank, each in enumerate(found):
            close(each, [wanted[rank]] * len(each))


def replan_apart(world: World, path: Path, plans: list[Path]) -> str:
    program = load(path, world=world)
    with pytest.raises(InputError) as error:
        next(program.replan(plans[world.rank % 2]))
    return str(error.value)


def test_ranks_with_different_plans_are_told(ranks: Ranks, artifact: Path, folder: Path) -> None:
    plans = [placement(MOVED, folder / "moved.json"), placement(PLACED, folder / "plan.json")]
    for said in ranks.run(replan_apart, artifact, plans):
        assert "ranks 0 and 1 were given different plans" in said


def refuse_plan(world: World, path: Path, plan: Path) -> str:
    program = load(path, world=world)
    with pytest.raises(InputError) as error:
        program.replan(plan)
    return str(error.value)


def test_a_plan_for_others_is_refused(ranks: Ranks, artifact: Path, folder: Path) -> None:
    table, split = np.array([PLACED[0]]), np.full((1, 8), 0.5)
    split[0, [1, 2, 4, 5]] = 1
    write_plan(Plan(parse_topology("2x2"), (7,), EXPERTS, (2,) * 4, table, split), folder / "other.json")
    (said, *_) = ranks.run(refuse_plan, artifact, folder / "other.json")
    assert "is for the layers 7, the program has 0, 1" in said


def try_to_load(world: World, path: Path) -> str:
    try:
        load(path, world=world)
    except ArtifactError as error:
        return str(error)
    return ""


def test_damage_matters_to_the_rank_whose_file_it_is(ranks: Ranks, artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.sparsec"
    shutil.copytree(artifact, path)
    (place,) = (path / "weights" / "ranks" / "00001").iterdir()
    content = bytearray(place.read_bytes())
    content[-1] ^= 1
    place.write_bytes(content)
    shutil.rmtree(path / "weights" / "ranks" / "00003")
    found = ranks.run(try_to_load, path)
    assert found[0] == found[2] == ""
    assert "is damaged: 'weights/ranks/00001/00000.safetensors' is not what was written" in found[1]
    assert "is incomplete: 'weights/ranks/00003/00000.safetensors' is missing" in found[3]
    with pytest.raises(ArtifactError, match=r"damaged|incomplete"):
        open_artifact(path)


def test_one_process_is_told_to_use_torchrun(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match=r"compiled for 4 devices.*torchrun --nproc-per-node 4"):
        load(artifact)


def run_until_one_dies(world: World, path: Path) -> tuple[str, float]:
    """What a rank is told, and how many seconds after the last run."""
    program, began = load(path, world=world), 0.0
    torch.distributed.barrier()  # loading may take one rank longer than the world's timeout
    try:
        for _ in range(1000 if world.rank != 2 else 3):
            began = time.monotonic()
            logits_of(program, world.rank)
    except RankError as error:
        return str(error), time.monotonic() - began
    os._exit(1)


def test_a_rank_that_dies_ends_the_others(artifact: Path) -> None:
    ranks = Ranks(timeout=6.0)
    try:
        ranks.start(run_until_one_dies, artifact)
        said = [ranks.answer(rank) for rank in (0, 1, 3)]
    finally:
        ranks.close()
    for ok, (text, seconds) in said:
        assert ok and "rank 2 does not answer" in text
        assert seconds < 12


def test_info_accounts_for_the_whole_model(artifact: Path, model: Any) -> None:
    found = info(artifact)
    assert found.placed is not None and found.moe_layers == LAYERS
    assert (found.placed.devices, found.placed.width, found.placed.slots) == (RANKS, 2, SLOTS)
    assert len(set(found.placed.own_bytes)) == 1 and found.placed.own_bytes[0] > LAYERS * SLOTS * 3 * 32 * 48 * 4
    assert [(routed.experts, routed.k) for routed in found.routed] == [(EXPERTS, 2)]
    assert found.total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
def test_torchrun(artifact: Path, model: Any) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "-m", "sparsec", "run"]
    prompts = [part for rank in range(RANKS) for part in ("--prompt-ids", f"{5 + rank},7,9")]
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [*command, str(artifact), *prompts, "-n", "6"],
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr
    right = model.generate(torch.tensor([[5, 7, 9]]), max_new_tokens=6, do_sample=False)[0, 3:]
    assert done.stdout.split() == [str(token) for token in right.tolist()]
