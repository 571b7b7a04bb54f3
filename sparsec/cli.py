"""The command `sparsec`. Exit status: 0 done, 1 not done (the reason is on stderr), 2 a wrong command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from sparsec import __version__
from sparsec.commands.options import DTYPES, PHASES
from sparsec.config import DISPATCHES, PAYLOADS, POLICIES
from sparsec.diagnostics import SparsecError

CommandT = TypeVar("CommandT", bound=Callable[..., Any])
MOST = 2**31 - 1
"""Of a number that counts something."""


def target_option(function: CommandT) -> CommandT:
    return click.option("--target", help="See `sparsec targets`; default: cpu, or what SPARSEC_TARGET says.")(function)


def dtype_option(function: CommandT) -> CommandT:
    return click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the parameters; default: the model's.")(
        function
    )


def dump_option(function: CommandT) -> CommandT:
    return click.option(
        "--dump", type=click.Path(path_type=Path), help="Folder for the IR after every pass, diffs, remarks."
    )(function)


def random_option(function: CommandT) -> CommandT:
    return click.option("--random-weights", is_flag=True, help="Make weights up instead of reading them.")(function)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sparsec")
def cli() -> None:
    """Compile sparse expert (Mixture-of-Experts) models.

    MODEL is a folder of transformers (config.json, with or without weights), FILE.py:FACTORY whose factory() returns
    (model, example inputs), a .pt2 file of torch.export that you trust, or the text of a module (.sparsec).
    """


@cli.command("compile")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Artifact, or text with --to.")
@target_option
@dtype_option
@random_option
@click.option("--to", "to", type=click.Choice(PHASES), default="emit", show_default=True, help="Stop after a phase.")
@click.option("--from", "start", type=click.Choice(PHASES[:-1]), help="Phase that a text is at; default: what it says.")
@click.option(
    "--weights",
    multiple=True,
    metavar="[int8|int4|fp8|mxfp4|ARTIFACT]",
    help="Store the experts' weights as int8 or int4 (CPU), fp8 or mxfp4 (GPU). "
    "For a text: the artifact with its weights; both may be given.",
)
@click.option(
    "--activations",
    type=click.Choice(["int8", "fp8"]),
    help="Round what weights are multiplied by: to int8 with int8 or int4 weights (CPU), to fp8 with fp8 ones (GPU).",
)
@click.option("--devices", metavar="N|NODESxN", help="Spread the experts over so many devices, a process each.")
@click.option("--plan", type=click.Path(path_type=Path), help="Who holds which experts (`sparsec plan`); else evenly.")
@click.option("--dispatch", type=click.Choice(DISPATCHES), help="Send a token once for each pick, rank or node.")
@click.option("--policy", type=click.Choice(POLICIES), help="Which replica of an expert gets a token.")
@click.option("--payload", type=click.Choice(PAYLOADS), help="How rows travel to experts.  [default: model, as is]")
@click.option("--chunks", type=click.IntRange(min=1), help="Send a layer's tokens in parts, to compute meanwhile.")
@click.option("--max-length", type=click.IntRange(min=1), help="Positions of a language model's cache.")
@click.option("--no-cache", is_flag=True, help="Compile a language model as it is, without a cache for generating.")
@dump_option
@click.option(
    "--cost", metavar="CHIP", help="Print costs beside the ops: on cuda:sm_90, cpu (measured), 37GB/s,6.7TFLOP/s."
)
@click.option("--size", "sizes", multiple=True, metavar="s0=4", help="With --cost: a size that is known at run time.")
@click.option("--json", "as_json", is_flag=True, help="Say what was done as JSON.")
def compile_command(**options: Any) -> None:
    """Compile MODEL into an artifact, or with --to PHASE into the text of that phase."""
    from sparsec.commands import compile_model

    compile_model.run(**options)


@cli.command("run")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt", multiple=True, help="Text to go on from; needs a tokenizer.json in the artifact.")
@click.option("--prompt-ids", multiple=True, help="Token ids to go on from: 1,2,3.")
@click.option(
    "-n", "--max-new-tokens", type=click.IntRange(min=1), help="Default: 64, or as many as there is room for."
)
@click.option("--trust-code", is_flag=True, help="Run the artifact's native code though it was not compiled here.")
@click.option("--huge-pages", is_flag=True, help="Read weights into huge pages: loads slower, decodes faster.")
@click.option("--json", "as_json", is_flag=True, help="Print tokens and speed as JSON.")
def run_command(**options: Any) -> None:
    """Generate text with the language model in ARTIFACT.

    One that was compiled for several devices is started by `torchrun --nproc-per-node N -m sparsec run ARTIFACT`. Give
    --prompt or --prompt-ids once for all ranks or once for each; every rank generates from its own, and rank 0 prints.
    """
    from sparsec.commands import run_artifact

    run_artifact.run(**options)


@cli.command("check")
@click.argument("model")
@dtype_option
@random_option
@click.option("--tokens", default="1,7,64", show_default=True, help="Token counts to run at.")
@dump_option
@click.option("--json", "as_json", is_flag=True)
def check_command(**options: Any) -> None:
    """Compile MODEL for the CPU and compare it with eager PyTorch, block by block with forced routing.

    In f32 a block must agree to a relative error of 1e-5. In bf16 and f16 it must be no further from an f32 reference
    than eager PyTorch is, times 1.1.
    """
    from sparsec.commands import check_model

    check_model.run(**options)


@cli.command("bisect")
@click.argument("model")
@target_option
@random_option
@click.option("--tolerance", type=float, default=1e-3, show_default=True, help="Largest relative error that is right.")
@dump_option
@click.option("--json", "as_json", is_flag=True)
def bisect_command(**options: Any) -> None:
    """Find the pass, the op in it, or the kernel that makes MODEL's numbers wrong. Needs no test of yours."""
    from sparsec.commands import bisect_model

    bisect_model.run(**options)


@cli.command("info")
@click.argument("model")
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, help="Batch sizes to give traffic for.")
@click.option("--json", "as_json", is_flag=True)
def info_command(**options: Any) -> None:
    """Account for MODEL (or an artifact): experts, total and active parameters, bytes per token. Needs no weights."""
    from sparsec.commands import info_model

    info_model.run(**options)


@cli.command("schedule")
@click.argument("model")
@target_option
@click.option("--tokens", type=click.IntRange(min=1), multiple=True, help="Compare all families at this many tokens.")
@click.option("--all", "every", is_flag=True, help="With --tokens: every variant, not the fastest of each family.")
@click.option("--weights", type=click.Choice(["fp8", "mxfp4"]), help="As if the experts' weights were stored so.")
@click.option("--json", "as_json", is_flag=True)
def schedule_command(**options: Any) -> None:
    """Say how MODEL (or an artifact) runs on a GPU, and why: predicted times, limits, runners-up. Needs no GPU."""
    from sparsec.commands import schedule_model

    schedule_model.run(**options)


@cli.command("tune")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--seconds", type=click.FloatRange(min=1), default=60.0, show_default=True, help="Time to search in.")
@click.option("--json", "as_json", is_flag=True)
def tune_command(**options: Any) -> None:
    """Time the likely kernels of ARTIFACT on the GPU here, and write the fastest into it. Optional, and once."""
    from sparsec.commands import tune_artifact

    tune_artifact.run(**options)


@cli.command("opt")
@click.argument("source", type=click.Path(path_type=Path, allow_dash=True), required=False)
@click.option("--passes", help="A pipeline: canonicalize,raise-route{max-ops=64},dce. Default: a reproducer's own.")
@click.option("--target", help="What the passes plan for; default: what the text says, else cpu.")
@click.option("-o", "--output", type=click.Path(path_type=Path, allow_dash=True), default=Path("-"))
@click.option("--generic", is_flag=True, help="Print MLIR's generic form.")
@click.option(
    "--cost", metavar="CHIP", help="Print costs beside the ops: on cuda:sm_90, cpu (measured), 37GB/s,6.7TFLOP/s."
)
@click.option("--size", "sizes", multiple=True, metavar="s0=4", help="With --cost: a size that is known at run time.")
@click.option("--list", "list_passes", is_flag=True, help="List the passes and their options.")
@click.option("--reduce", is_flag=True, help="Of a text that fails, write the least that still fails the same way.")
@click.option("--seconds", type=click.FloatRange(min=0), default=60.0, show_default=True, help="Time for --reduce.")
def opt_command(**options: Any) -> None:
    """Run passes over the text of a module: IR in, IR out (`-` is standard input or output)."""
    from sparsec.commands import opt_text

    opt_text.run(**options)


@cli.command("diff")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--phase", type=click.Choice(PHASES[:-1]), help="Of dumps: compare the modules after this phase.")
@click.option("--json", "as_json", is_flag=True)
def diff_command(**options: Any) -> None:
    """Say what differs between two modules, op by op: texts, artifacts, or runs of a dump. Exit status 1 if they do.

    Renumbered values, locations and spelled-out defaults are no difference.
    """
    from sparsec.commands import diff_modules

    if diff_modules.run(**options):
        sys.exit(1)


@cli.command("explain")
@click.argument("model")
@target_option
@click.option("--layer", default="", help="Only these: model.layers.3, or a pattern: model.layers.*.mlp.")
@click.option("--file", default="", help="Only what comes from this file of yours: modeling.py, or modeling.py:104.")
@click.option("--pass", "rule", default="", help="Only what this pass or rule did or declined.")
@click.option("--missed", is_flag=True, help="Only what was declined.")
@click.option("--cost", metavar="CHIP", help="Whose times gains are: cuda:sm_90, cpu (measured), 37GB/s,6.7TFLOP/s.")
@click.option("--size", "sizes", multiple=True, metavar="s0=4", help="For gains: a size that is known at run time.")
@click.option("--json", "as_json", is_flag=True)
def explain_command(**options: Any) -> None:
    """Say what was fused in MODEL, by which rule, what was not, why, what to try, and what that may be worth.

    MODEL may also be a run of a dump, or a text.
    """
    from sparsec.commands import explain_model

    explain_model.run(**options)


@cli.command("export")
@click.argument("model")
@click.option("--mlir", "to", flag_value="mlir", default=True, help="MLIR's generic form, and IRDL beside it.")
@click.option("--to", "to", type=click.Choice(["mlir", "irdl", "linalg"]), help="What to write.  [default: mlir]")
@click.option("-o", "--output", type=click.Path(path_type=Path, allow_dash=True), required=True)
@click.option("--phase", type=click.Choice(PHASES[:-1]), help="Run the compiler up to a phase; linalg: raise.")
@target_option
@click.option("--layer", metavar="NAME", help="linalg: which expert layer, by its module path; default: the first.")
@click.option("--tokens", type=click.IntRange(min=1), help="linalg: how many tokens it takes; default: 16.")
@click.option("--check", is_flag=True, help="linalg: run it on MLIR's ExecutionEngine, compare with the reference.")
@click.option("--json", "as_json", is_flag=True)
def export_command(**options: Any) -> None:
    """Write MODEL (or an artifact, a dump) for the tools of MLIR.

    `--mlir` writes the module, and FILE.irdl.mlir with its dialects: mlir-opt --irdl-file=FILE.irdl.mlir
    --allow-unregistered-dialect FILE.mlir verifies it; `sparsec opt` and `sparsec compile` read it back. `--to linalg`
    lowers one expert layer, router included, by torch-mlir.
    """
    from sparsec.commands import export_module

    export_module.run(**options)


@cli.command("view")
@click.argument("path", metavar="DUMPFOLDER|PLAN", type=click.Path(path_type=Path))
@click.option("--load", "loads", multiple=True, metavar="FILE", help="Of a plan: the traffic to show it under.")
@click.option("--old", type=click.Path(path_type=Path), help="Of a plan: the one before; else experts in order.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Of a plan: the page; default: PLAN.html.")
def view_command(**options: Any) -> None:
    """(Re)write the page of a run of a dump, or of a plan, one file without server or network, and print its path.

    The page of a run shows what lies in its folder: `sparsec trace MODEL -o DUMPFOLDER` adds the experts' load.
    """
    from sparsec.commands import view_dump

    view_dump.run(**options)


@cli.command("trace")
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="trace.json, or a dump's run, for its page."
)
@click.option("--prompt-ids", help="Token ids to run on: 1,2,3.")
@click.option("--tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Random ones, else.")
@click.option("-n", "--max-new-tokens", "new_tokens", type=click.IntRange(min=0), default=0, show_default=True)
@random_option
@click.option("--json", "as_json", is_flag=True)
def trace_command(**options: Any) -> None:
    """Record how many tokens each expert of each layer of MODEL gets, step by step.

    The reference interpreter runs the model: slow and exact, for small models and short prompts.
    """
    from sparsec.commands import trace_model

    trace_model.run(**options)


@cli.command("plan")
@click.option(
    "--load",
    "loads",
    multiple=True,
    required=True,
    metavar="FILE",
    help="Counts [layers, experts]: a scenario or more.",
)
@click.option(
    "--topology", required=True, metavar="SPEC", help="8x8:nvlink=450GB/s,ib=50GB/s,memory=80GB (nodes x ranks)."
)
@click.option("--slots", type=click.IntRange(1, MOST), required=True, help="Experts of a layer that a rank holds.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The plan, as JSON.")
@click.option("--html", type=click.Path(path_type=Path), help="A page too: loads, traffic and replicas of the plan.")
@click.option(
    "--batch", type=click.IntRange(0, MOST), default=0, help="Hold on the noise of batches of this many picks."
)
@click.option("--robust/--exact", default=None, help="Hold on other traffic, or fit the mean; default: by scenarios.")
@click.option(
    "--routing", type=click.Path(path_type=Path), help="Experts of tokens [tokens, layers, k]: few nodes each."
)
@click.option("--old", type=click.Path(path_type=Path), help="The plan in use.")
@click.option(
    "--moves", type=click.IntRange(0, MOST), help="With --old: experts that may be loaded anew, in all layers."
)
@click.option("--expert-bytes", type=click.FloatRange(min=0), default=0.0, help="Of one expert's weights.")
@click.option("--row-bytes", type=click.FloatRange(min=0), default=0.0, help="Of one token that is sent.")
@click.option("--seconds", type=click.FloatRange(min=0), default=45.0, show_default=True, help="Time to search in.")
@click.option("--rounds", type=click.IntRange(0, MOST), default=300, show_default=True, help="Rounds of the search.")
@click.option("--workers", type=click.IntRange(1, 64), default=2, show_default=True, help="Processes that search.")
@click.option("--seed", type=click.IntRange(0, MOST), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def plan_command(**options: Any) -> None:
    """Plan which ranks hold which experts, from measured loads, so that it holds on other traffic too."""
    from sparsec.commands import plan_experts

    plan_experts.run(**options)


@cli.command("simulate")
@click.argument("model", required=False)
@click.option("--plan", type=click.Path(path_type=Path), help="A placement, of `sparsec plan`.")
@click.option("--devices", metavar="8..2048", help="Instead: so many devices (8..2048 doubles; or 32,72).")
@click.option("--topology", metavar="SPEC", help="With --devices: its first node is repeated.  [default: 1x8]")
@click.option("--target", default="cuda:sm_90", show_default=True, help="The GPU, see `sparsec targets`.")
@click.option("--tokens", type=click.IntRange(1, MOST), default=128, show_default=True, help="Of each rank, in a step.")
@click.option("--context", type=click.FloatRange(0, MOST), default=0.0, help="Tokens that each token attends to.")
@click.option("--hidden", type=click.IntRange(1, MOST), help="Width of a token; these numbers instead of MODEL.")
@click.option("--intermediate", type=click.IntRange(1, MOST), help="Width of an expert.")
@click.option("--experts", type=click.IntRange(1, MOST), help="In a layer.")
@click.option("--top-k", "k", type=click.IntRange(1, MOST), help="Experts of a token.")
@click.option("--layers", type=click.IntRange(1, MOST), help="That have experts.")
@click.option("--dtype", type=click.Choice(["fp8", "bf16", "f16", "f32"]), help="Of the weights.  [default: bf16]")
@click.option("--shared", type=click.FloatRange(0, MOST), help="Experts that every token goes to.")
@click.option("--groups", type=click.IntRange(1, MOST), help="Of experts, of which a token uses --top-groups.")
@click.option("--top-groups", type=click.IntRange(1, MOST), help="See --groups.")
@click.option("--rest", type=click.IntRange(0, 2**53), help="Parameters of a layer beside its experts.")
@click.option("--slots", type=click.IntRange(1, MOST), help="With --devices: experts of a layer that a rank holds.")
@click.option("--placement", type=click.Choice(["packed", "in-order"]), default="packed", help="With --devices.")
@click.option("--split", type=click.Choice(["planned", "best"]), default="planned", help="Of a batch over replicas.")
@click.option("--dedup", type=click.Choice(["none", "rank", "node"]), default="none", help="Rows of a token.")
@click.option("--algo", type=click.Choice(["flat", "two_level"]), help="[default: flat; with --dedup node, two_level]")
@click.option("--payload", type=click.Choice(["model", "fp8"]), default="model", help="Of dispatched rows.")
@click.option("--schedule", type=click.Choice(["sum", "shared", "two-batch"]), default="sum", help="What overlaps.")
@click.option("--load", "loads", multiple=True, metavar="FILE", help="Recorded counts; else they are drawn.")
@click.option("--routing", type=click.Path(path_type=Path), help="With --plan: experts of recorded tokens.")
@click.option("--policy", type=click.Choice(POLICIES), default="static", help="With --routing: which replica.")
@click.option("--batches", type=click.IntRange(1, 1000), default=4, show_default=True, help="Drawn for each layer.")
@click.option("--seed", type=click.IntRange(0, MOST), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def simulate_command(**options: Any) -> None:
    """Say how long a step's expert layers take on 8 to 2048 devices: compute, links, overlap.

    The model is MODEL (a folder, an artifact) or given by numbers. What is fitted, what is a data sheet's figure and
    what is extrapolated is said below the table.
    """
    from sparsec.commands import simulate_plan

    simulate_plan.run(**options)


@cli.command("targets")
@click.option("--json", "as_json", is_flag=True)
def targets_command(as_json: bool) -> None:
    """List what sparsec compiles for, and what of it runs on this machine."""
    from sparsec.commands import list_targets

    list_targets.run(as_json)


def main() -> None:
    """Run the command line and exit."""
    from sparsec.runtime.errors import ArtifactError, InputError, RankError

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they would mix with ours
    try:
        cli(standalone_mode=False)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(1)
    except (SparsecError, ArtifactError, InputError, RankError) as error:
        from sparsec.console import fail

        fail(str(error))
        sys.exit(1)
    except UnicodeDecodeError as error:
        print(f"error: what should be text is not: byte {error.start} is no UTF-8", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
