"""The command line: ``rlstab train CONFIG``. A config is a Python file whose ``config()`` returns a `RunConfig`."""

import dataclasses
import itertools
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from rlstab_jax.config_file import load_config
from rlstab_jax.parallel import distributed
from rlstab_jax.parallel.distributed import DistributedOptions
from rlstab_jax.parallel.process import prepare_jax
from rlstab_jax.progress import progress, silence
from rlstab_jax.training.interrupt import keep_interrupts
from rlstab_jax.types import UserError

USAGE = """usage: rlstab COMMAND CONFIG [options]

commands:
  train CONFIG   cold start (or resume), then reinforcement learning
  sft CONFIG     the cold start alone
  plan CONFIG --topology v5p:4x4x4
                 memory, time and cost on accelerators that are not there
  diagnose CHECKPOINT [CONFIG]
                 the gaps between the engines before training, for a list of precisions
  eval CHECKPOINT [CONFIG] --data FILE
                 accuracy, pass@k and majority votes on a file of prompts
  report RUN [RUN ...]
                 one HTML page, and a picture, that compare runs
  import-hf REPO_OR_DIR OUT
                 a Hugging Face checkpoint becomes a directory to begin runs from (--initial OUT)
  export-hf CHECKPOINT DIR
                 a run or an import becomes a Hugging Face checkpoint

CONFIG is a Python file whose `config()` returns a RunConfig, such as configs/quickstart.py.
`rlstab train CONFIG --help` explains every option and field."""

# Exit codes: 2 a mistake in the input, 1 a failure while running, 128 + number a signal, 3 the monitor's policy `stop`.
STOPPED = {"SIGINT": 130, "SIGTERM": 143, "monitor": 3}


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Options of a run that do not change what it computes."""

    out: str | None = None
    """Directory of the run, or gs://BUCKET/PATH; runs/<config>-seed<seed> by default. The same command again resumes
    it."""
    steps: int | None = None
    """Gradient steps of the whole run; short for --gradient-steps."""
    resume: bool = True
    """--no-resume refuses a directory that holds a run already."""
    fresh: bool = False
    """Begin anew; a run that is there is kept under another name."""
    accept_code: bool = False
    """Go on though a loss, reward or task of your own has another code than the run was begun with, e.g. a mended one;
    its manifest keeps both checksums."""
    profile: int | None = None
    """Global step of which to leave a profiler trace in OUT/profile."""
    compilation_cache: Path | None = Path.home() / ".cache" / "rlstab_jax" / "xla"
    """Where compiled programs are kept between runs; None for nowhere."""
    distributed: DistributedOptions = DistributedOptions()
    """Several processes that make one run."""


@dataclasses.dataclass(frozen=True)
class SftOptions:
    """Options of a cold start alone."""

    out: Path | None = None
    """Directory of the run that it is for, as train takes it; the cold start goes into cold_start beside it."""
    compilation_cache: Path | None = TrainOptions.compilation_cache
    """Where compiled programs are kept between runs; None for nowhere."""


@dataclasses.dataclass(frozen=True)
class DiagnoseOptions:
    """Options of a diagnosis."""

    out: Path | None = None
    """Directory for gaps.json and gaps.png; runs/diagnose-<checkpoint>-<config> by default. Earlier ones there are kept
    under other names."""
    precisions: tuple[str, ...] = ("float32", "bfloat16", "fp8_e4m3", "fp8_e4m3_router_exempt", "fp8_e5m2")
    """Number formats of the inference engine; others are fp8_e4m3_weights, fp8_e4m3_blocks, float16, int8, fp4_e2m1."""
    prompts: int = 64
    """Held-out prompts to answer, with --samples-per-prompt responses each."""
    compilation_cache: Path | None = TrainOptions.compilation_cache
    """Where compiled programs are kept between runs; None for nowhere."""


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Options of a plan."""

    topology: str = ""
    """Accelerators to plan for, such as v5e:4x4, v5p:4x4x4 or cuda:h100:64; an unknown one lists the known."""
    price: float | None = None
    """Of a chip-hour, in any currency; gives the cost of the run."""
    by: tuple[int, ...] = (1, 2, 4, 8)
    """Values of N, minibatches, to compare."""
    json: bool = False
    """JSON on standard output in the place of tables."""


def eval_options() -> Any:
    """The options of ``rlstab eval``: what is asked, and what changes no number."""
    from rlstab_jax.training.assess import Assessment

    @dataclasses.dataclass(frozen=True)
    class EvalOptions(Assessment):
        out: Path | None = None
        """Directory for eval.json and responses.jsonl; runs/eval-<checkpoint>-<data>-<engine> by default. The same
        command again goes on."""
        fresh: bool = False
        """Begin anew; what is there is kept under another name."""
        compilation_cache: Path | None = TrainOptions.compilation_cache
        """Where compiled programs are kept between runs; None for nowhere."""

    return EvalOptions()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. A user's mistake is one line on standard error, never a traceback."""
    process = arguments is None
    if process:
        keep_interrupts()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else ""
    if command not in COMMANDS:
        asked = command in HELP
        mistake = f"rlstab: unknown command {command!r}\n\n" if command and not asked else ""
        print(mistake + USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    began = False

    def begin() -> None:
        nonlocal began
        began = True

    try:
        for before, argument in itertools.pairwise([command, *arguments[1:]]):
            taken = command == "train" and (before == "--out" or argument.startswith("--out="))
            if "gs://" in argument and not taken:
                raise UserError(
                    f"{argument}: only train --out takes a bucket; copy what is there to a directory first, "
                    f"with gcloud storage cp -r {argument.partition('=')[2] or argument} ."
                )
        with distributed.ending_together(f"rlstab {command}"):
            return COMMANDS[command](arguments[1:], begin)
    except (UserError, OSError) as error:  # an OSError names its file: no permission, no such directory
        print(f"rlstab {command}: {error}", file=sys.stderr)
        return distributed.failed(1 if began else 2)
    except SystemExit as error:
        if not began and isinstance(error.code, int | None):  # the parser has printed help, or a mistake in the options
            return error.code or 0
        print(f"rlstab {command}: code of the config's called sys.exit({error.code!r})", file=sys.stderr)
        return distributed.failed(1)
    except KeyboardInterrupt:
        print(f"rlstab {command}: stopped by Ctrl-C", file=sys.stderr, flush=True)
        if process:  # without Python's own end: it unloads what the compiler's threads are still at work with
            sys.stdout.flush()
            os._exit(STOPPED["SIGINT"])
        return STOPPED["SIGINT"]


HELP = ("-h", "--help")
CHECKPOINT_FIRST = ("diagnose", "eval")


def parse(
    command: str, arguments: Sequence[str], known: Any = TrainOptions(), default: Any = None
) -> tuple[Path, Any, Any]:
    """The config file, the options, and the config (``default``, or the file's) with the command line's overrides."""
    usage = f"rlstab {command} CHECKPOINT" if command in CHECKPOINT_FIRST else f"rlstab {command}"
    if arguments and arguments[0] in HELP:
        from rlstab_jax.training.config import RunConfig

        arguments, default = ["CONFIG", *arguments], RunConfig()
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"expected the path of a config file: {usage} configs/quickstart.py")
    path = Path(arguments[0])
    default = default or load_config(path)
    config_type, options_type = type(default), type(known)

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        options: Annotated[options_type, tyro.conf.arg(name="")] = known
        config: Annotated[config_type, tyro.conf.arg(name="")] = default

    parsed = tyro.cli(
        Arguments,
        args=list(arguments[1:]),
        prog=f"{usage} [CONFIG]" if command in CHECKPOINT_FIRST and str(path) == "CONFIG" else f"{usage} {path}",
        description=f"Fields and defaults are those of {'RunConfig' if str(path) == 'CONFIG' else path}.",
        config=(tyro.conf.AvoidSubcommands,),
    )
    return path, parsed.options, parsed.config


def train_command(arguments: Sequence[str], begin: Any) -> int:
    from rlstab_jax.training.home import home_of
    from rlstab_jax.training.run import train

    path, options, config = parse("train", arguments)
    if options.steps is not None:
        config = dataclasses.replace(config, gradient_steps=options.steps)
    if options.out == "":
        raise UserError("--out is empty: give a directory, or leave it out")
    out = options.out or f"runs/{path.stem}-seed{config.seed}"
    home = home_of(out)
    if not options.resume and not options.fresh and home.begun:
        raise UserError(f"{out} holds a run already: give another --out, --fresh to begin anew, or --resume to go on")
    prepare_jax(options.compilation_cache)
    if distributed.start(options.distributed, "rlstab train"):
        distributed.agree_on(facts(config, out=out, fresh=options.fresh, accept_code=options.accept_code))
    with progress(config.gradient_steps) if distributed.first() else silence() as (say, watch):
        say(f"run: {out}")
        stopped = train(
            config,
            out,
            fresh=options.fresh,
            accept_code=options.accept_code,
            profile=options.profile,
            say=say,
            watch=watch,
            begin=begin,
        )
    if stopped:
        return STOPPED[stopped]
    if distributed.first():
        print(f"done: {out}/report.png, metrics.jsonl, samples.jsonl, checkpoints/")
    return 0


def facts(config: Any, **options: Any) -> dict[str, Any]:
    """What all processes of a run must have in common: the config, the options, versions and our own source."""
    from rlstab_jax.own_code import code_of
    from rlstab_jax.rundir import leaves, plain
    from rlstab_jax.training.run import versions

    package = Path(__file__).parent
    source = b"".join(file.read_bytes() for file in sorted(package.rglob("*.py")))
    installed = {f"the version of {name}": version for name, version in versions().items()}
    return {
        **options,
        **dict(leaves(plain(config))),
        **code_of(config),
        **installed,
        f"the checksum of {package.name}'s source": zlib.crc32(source),
    }


def sft_command(arguments: Sequence[str], begin: Any) -> int:
    from rlstab_jax.training.cold_start import cold_start
    from rlstab_jax.training.engines import build
    from rlstab_jax.training.interrupt import stop_on_signal

    path, options, config = parse("sft", arguments, SftOptions())
    if not config.cold_start.max_steps:
        raise UserError("cold_start.max_steps = 0: no cold start is asked for; give at least 1")
    prepare_jax(options.compilation_cache)
    engines = build(config)
    begin()
    started = time.perf_counter()
    with stop_on_signal() as stop:
        made = cold_start(engines, (options.out or Path("runs") / path.stem).parent / "cold_start", stop=stop)
    print(f"{time.perf_counter() - started:.1f} s")
    if made is None:
        print(f"stopped by {stop.reason}; the same command goes on from here")
    return STOPPED[stop.reason] if made is None and stop.reason else 0


def diagnose_command(arguments: Sequence[str], begin: Any) -> int:
    from rlstab_jax.report.diagnose import draw_diagnosis
    from rlstab_jax.rundir import run_of, set_aside
    from rlstab_jax.training.diagnose import diagnose, print_line, print_table, write_json

    example = "runs/my-run --precisions float32 fp8_e4m3"
    checkpoint, path, options, config = parse_checkpoint("diagnose", arguments, DiagnoseOptions(), example)
    out = options.out or Path("runs") / f"diagnose-{run_of(checkpoint).name}-{path.stem}"
    prepare_jax(options.compilation_cache)

    def ready() -> None:
        out.mkdir(parents=True, exist_ok=True)  # which fails now, and not after the work
        begin()

    step, gaps = diagnose(config, checkpoint, options.precisions, options.prompts, ready, print_line)
    print_table(gaps)
    for file in (out / "gaps.json", out / "gaps.png"):
        if file.exists():
            print(f"{file} is kept as {set_aside(file)}")
    write_json(out / "gaps.json", checkpoint, step, gaps)
    draw_diagnosis([dataclasses.asdict(g) for g in gaps], out / "gaps.png", f"{checkpoint.name}, step {step}")
    print(f"done: {out}/gaps.json, gaps.png")
    return 0


def plan_command(arguments: Sequence[str], begin: Any) -> int:
    from rich.console import Console

    from rlstab_jax.parallel.topology import topology, without_accelerators
    from rlstab_jax.rundir import plain
    from rlstab_jax.training.plan import make_plan
    from rlstab_jax.training.plan_report import as_json, by_minibatches, print_plan

    _, options, config = parse("plan", arguments, PlanOptions())
    chosen = topology(options.topology)
    if (options.price is not None and not 0 <= options.price < math.inf) or any(n < 1 for n in options.by):
        raise UserError(f"--price {options.price} --by {options.by}: expected a price of 0 or more, and N of 1 or more")
    without_accelerators()
    plan = make_plan(config, chosen, say=lambda line: print(line, file=sys.stderr, flush=True))
    table = by_minibatches(plan, options.by, options.price)
    if options.json:
        print(json.dumps(plain(as_json(plan, table, options.price))))
    else:
        wide = None if sys.stdout.isatty() else 140  # into a file, where 80 columns would cut the tables' numbers
        print_plan(plan, table, options.price, Console(width=wide))
    return 0


def eval_command(arguments: Sequence[str], begin: Any) -> int:
    from rlstab_jax.rundir import run_of
    from rlstab_jax.training.assess import assess, line_of_result

    example = "runs/my-run --data aime.jsonl --layout aime"
    checkpoint, _, options, config = parse_checkpoint("eval", arguments, eval_options(), example)
    data = options.data.stem if options.data else "heldout"
    out = options.out or Path("runs") / f"eval-{run_of(checkpoint).name}-{data}-{options.engine}"
    prepare_jax(options.compilation_cache)
    result = assess(config, checkpoint, options, out, fresh=options.fresh, begin=begin)
    print(line_of_result(result))
    print(f"done: {out}/eval.json, responses.jsonl")
    return 0


def parse_checkpoint(command: str, arguments: Sequence[str], known: Any, example: str) -> tuple[Path, Path, Any, Any]:
    """The checkpoint that comes first, and what `parse` returns for the rest: a config is named, or is the run's."""
    if arguments and arguments[0] in HELP:
        parse(command, arguments, known)
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"expected a checkpoint first: rlstab {command} {example}")
    checkpoint, rest = Path(arguments[0]), list(arguments[1:])
    own = not rest or rest[0].startswith("-")
    path, default = config_of_run(checkpoint, command) if own else (Path(rest.pop(0)), None)
    return checkpoint, *parse(command, [str(path), *rest], known, default)


def config_of_run(checkpoint: Path, command: str) -> tuple[Path, Any]:
    """The config that a run was made with, and its file: by the command in its manifest, checked against the config
    there. ``command`` is the one that asks."""
    from rlstab_jax.rundir import MAY_CHANGE, config_difference, read_manifest, run_of
    from rlstab_jax.training.config import defaults

    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: there is no such directory; give a run's, such as runs/quickstart-seed0")
    run = run_of(checkpoint)
    help_ = f"name the config: rlstab {command} {checkpoint} CONFIG ..."
    manifest = read_manifest(run) if (run / "manifest.json").exists() else {}
    made_by = manifest.get("command", [])
    if "train" not in made_by or "config" not in manifest:
        raise UserError(f"{checkpoint}: no manifest there says which config it was made with; {help_}")
    try:
        path, _, config = parse("train", made_by[made_by.index("train") + 1 :])
    except UserError as error:
        raise UserError(f"{error}; {help_}") from None
    for name, there, here in config_difference(manifest["config"], config, defaults()):
        if name not in MAY_CHANGE:
            raise UserError(f"{path} has changed since the run was made: {name} was {there!r} and is {here!r}; {help_}")
    return path, config


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Compares runs on one HTML page that needs nothing but itself, and in a picture (.png) beside it. Unfinished runs
    are shown as far as they are."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of runs; a directory that holds runs stands for all of them."""
    out: Path | None = None
    """The page; report.html in the directory of a single run, else in the current one. It replaces an earlier one."""
    over: tuple[str, ...] = ("seed",)
    """Config fields in which the runs of one group may differ, e.g. seed cold_start.seed."""


def report_command(arguments: Sequence[str], begin: Any) -> int:
    from rlstab_jax.report.page import write_report

    options = tyro.cli(ReportOptions, args=list(arguments), prog="rlstab report")
    page, picture = write_report(options.runs, options.out, options.over, begin=begin)
    print(f"done: {page}, {picture}")
    return 0


def import_hf_command(arguments: Sequence[str], begin: Any) -> int:
    from rlstab_jax.training.pretrained import ImportOptions, import_checkpoint

    return convert("import-hf", ImportOptions, import_checkpoint, arguments, begin)


def export_hf_command(arguments: Sequence[str], begin: Any) -> int:
    from rlstab_jax.training.pretrained import ExportOptions, export_checkpoint

    return convert("export-hf", ExportOptions, export_checkpoint, arguments, begin)


def convert(command: str, options_type: Any, run: Any, arguments: Sequence[str], begin: Any) -> int:
    """Parses ``arguments`` into ``options_type`` and runs a command that needs no config file."""
    options = tyro.cli(options_type, args=list(arguments), prog=f"rlstab {command}")
    prepare_jax(TrainOptions.compilation_cache)
    run(options, begin=begin)
    return 0


COMMANDS = {
    "train": train_command,
    "sft": sft_command,
    "plan": plan_command,
    "diagnose": diagnose_command,
    "eval": eval_command,
    "report": report_command,
    "import-hf": import_hf_command,
    "export-hf": export_hf_command,
}

if __name__ == "__main__":
    sys.exit(main())
