"""Are 49 tokens enough? One decoder that reads a teacher's patches, fewer tokens made of them, and encoders of ours.

    python -m eval.compare_encoders train --out runs/compare --encoders demo:sf_llava DIR25 DIR64 --parallel 4
    python -m eval.compare_encoders speed --out runs/compare
    python -m eval.compare_encoders table runs/compare --rows eval/results
    python -m eval.compare_encoders table eval/results

Protocol `compare-encoders-1`: every variant has the same decoder, conversations, batches in the same order, LoRA with
the same start, optimizer steps and held-out questions (`eval.scene_qa`). What differs is the visual tokens, and with
them the projector, which starts anew for each seed. Towers are frozen, so each image is encoded once, ahead, in the
precision of training; what trains is the projector (and a peer's own weights) and LoRA. `none` sees no image.
`train` gives one process to each variant; runs whose result is there are not trained again, so that an interrupted
command is simply repeated. Several `--projector-learning-rate` or `--teacher-layer` are all tried, and the table takes
the best of each variant by its loss on scenes that are neither trained on nor asked about.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sf_mllm.errors import CommandLineParser, InputError, nearest, report_input_errors

if TYPE_CHECKING:
    from eval.compare_parts import Parts, Settings

SIZES: dict[str, dict[str, Any]] = {
    "demo": {
        "scenes": 100_000,
        "questions": 5000,
        "steps": 2000,
        "batch_size": 256,
        "lora_rank": 64,
        "max_length": 256,
    },
    "tiny": {"scenes": 48, "questions": 24, "steps": 3, "batch_size": 8, "lora_rank": 2, "max_length": 96},
}
"""What a size means where the command line says nothing else; tiny rehearses the measurement on a CPU in seconds."""


@report_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = CommandLineParser(
        prog="python -m eval.compare_encoders", description="Visual tokens of several origins, read by one decoder."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train every variant and let it answer held-out questions")
    train.add_argument("--out", type=Path, required=True, help="folder of the comparison")
    train.add_argument("--size", choices=SIZES, default="demo", help="tiny: rehearsal with random models")
    train.add_argument("--teacher", default="demo:clip", help="open_clip model that brings its weights")
    train.add_argument("--encoders", nargs="+", default=["demo:sf_llava"], help="encoders of ours")
    train.add_argument("--decoder", default="demo:decoder")
    train.add_argument("--domain", choices=("plain", "clutter"), default="plain", help="of the scenes (default: plain)")
    train.add_argument("--variants", nargs="+", help="only these (default: all)")
    train.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="default: 0 1")
    for name, help_text in (
        ("scenes", "training scenes, one conversation each"),
        ("questions", "held-out questions"),
        ("steps", "optimizer steps"),
        ("batch-size", "conversations of a step"),
        ("lora-rank", "alpha is twice the rank"),
        ("max-length", "tokens of a conversation without the visual ones"),
    ):
        values = " / ".join(f"{size} {values[name.replace('-', '_')]}" for size, values in SIZES.items())
        train.add_argument(f"--{name}", type=int, help=f"{help_text} (default: {values})")
    train.add_argument("--learning-rate", type=float, default=1e-3, help="of the adapters (default: 1e-3)")
    train.add_argument("--projector-learning-rate", nargs="+", type=float, default=[1e-3], help="default: 1e-3")
    train.add_argument("--teacher-layer", nargs="+", type=int, default=[-2], help="-2 (default), -1 or both")
    train.add_argument("--compile", action="store_true", help="compile the model that trains")
    train.add_argument("--parallel", type=int, default=1, help="variants trained at once (default: 1)")
    train.add_argument("--sharing", type=int, help=argparse.SUPPRESS)  # said to the processes of --parallel
    speed = commands.add_parser("speed", help="measure what each variant costs, one after the other")
    speed.add_argument("--out", type=Path, required=True, help="folder that train has made")
    speed.add_argument("--variants", nargs="+", help="only these (default: all)")
    speed.add_argument("--teacher-layer", nargs="+", type=int, default=[-2], help="-2 (default), -1 or both")
    speed.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="and replay CUDA graphs (default: on a GPU)"
    )
    speed.add_argument("--repeats", type=int, default=50, help="of each measurement (default: 50)")
    for command in (train, speed):
        command.add_argument("--device", help="cuda, cpu; default: the best there is")
    table = commands.add_parser("table", help="print the table, and keep the results as rows")
    table.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="of train, with equal settings, or of kept rows"
    )
    table.add_argument("--rows", type=Path, help="folder to whose compare_*.csv the results are appended")
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(arguments)
    return {"train": _train, "speed": _speed, "table": _table}[options.command](options, arguments)


def _train(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    _check(options)
    from eval.compare_parts import Parts, Settings
    from eval.compare_run import make_all_texts, plan_runs, train_variant
    from sf_mllm.inference.loading import choose_device
    from sf_mllm.training.progress import configure_logging

    configure_logging()
    chosen = {name: getattr(options, name) for name in SIZES[options.size]}
    settings = Settings(
        size=options.size,
        teacher=options.teacher,
        encoders=tuple(options.encoders),
        decoder=options.decoder,
        domain=options.domain,
        learning_rate=options.learning_rate,
        **{name: SIZES[options.size][name] if value is None else value for name, value in chosen.items()},
    )
    parts = Parts(settings)
    variants = _choose(options.variants, parts)
    _claim(options.out, settings)
    runs = plan_runs(variants, options.seeds, options.projector_learning_rate, options.teacher_layer)
    if options.parallel == 1:
        for variant in variants:
            own = [run for run in runs if run.variant == variant]
            device = choose_device(options.device)
            parallel = options.sharing or 1
            train_variant(parts, own, options.out, device=device, compiled=options.compile, parallel=parallel)
        return 0
    make_all_texts(settings, parts.tokenizer(), options.out)
    return _train_in_processes(variants, options, arguments)


def _train_in_processes(variants: Sequence[str], options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Give one process to each variant; return how many failed."""
    logs = options.out / "logs"
    logs.mkdir(exist_ok=True)

    def train(variant: str) -> int:
        own = ["--variants", variant, "--parallel", "1", "--sharing", str(min(options.parallel, len(variants)))]
        command = [sys.executable, "-m", "eval.compare_encoders", *arguments, *own]
        with (logs / f"{variant}.log").open("w", encoding="utf-8") as log:
            status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        print(f"{variant}: {'complete' if status == 0 else f'failed, see {log.name}'}", flush=True)
        return status

    with ThreadPoolExecutor(options.parallel) as pool:
        return sum(status != 0 for status in pool.map(train, variants))


def _speed(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    if options.repeats < 1:
        raise InputError(f"--repeats {options.repeats} is not possible; give at least 1.")
    from eval.compare_parts import Parts, Settings
    from eval.compare_run import make_all_texts, plan_runs
    from eval.compare_speed import COLUMNS, measure_speed
    from eval.compare_table import speed_result_file
    from sf_mllm.bench.rows import describe_provenance
    from sf_mllm.config import write_text_atomically
    from sf_mllm.inference.loading import choose_device

    try:
        found = json.loads((options.out / "settings.json").read_text(encoding="utf-8"))
        settings = Settings(**{**found, "encoders": tuple(found["encoders"])})
    except (OSError, ValueError, KeyError, TypeError) as error:  # TypeError: settings of another version
        raise InputError(f"'{options.out}' holds no comparison; start the command train first.") from error
    parts = Parts(settings)
    device = choose_device(options.device)
    compiled = device.type == "cuda" if options.compile is None else options.compile
    if compiled and device.type != "cuda":
        raise InputError(f"--compile is for a CUDA device here, got {device.type}; leave it out.")
    texts = make_all_texts(settings, parts.tokenizer(), options.out)
    for run in plan_runs(_choose(options.variants, parts), [0], [0.0], options.teacher_layer):
        figures = measure_speed(parts, run, texts, device=device, compiled=compiled, repeats=options.repeats)
        print(f"{run.variant}: " + "  ".join(f"{name} {figures[name]}" for name in COLUMNS), flush=True)
        row = {**figures, "outcome": "complete", **describe_provenance(device.type)}
        write_text_atomically(speed_result_file(options.out, run.variant, run.layer), json.dumps(row, indent=1))
    return 0


def _table(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from eval.compare_table import COSTS, RUNS, is_kept, markdown_table, read_results

    print(markdown_table(*read_results(options.folders)))
    if options.rows is not None:
        from eval.rows import append_complete_rows

        new = [folder for folder in options.folders if not is_kept(folder)]
        if not new:
            raise InputError("--rows keeps what is new, and all of this is kept already; leave it out.")
        for name, rows in zip((RUNS, COSTS), read_results(new, costs_will_do=True), strict=True):
            if rows:
                append_complete_rows(name, rows, options.rows)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse values that no run can have."""
    for name in ("scenes", "questions", "steps", "batch_size", "lora_rank", "max_length", "parallel"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} is not possible; give at least 1.")
    scenes, batch_size = (
        SIZES[options.size][name] if getattr(options, name) is None else getattr(options, name)
        for name in ("scenes", "batch_size")
    )
    if scenes < batch_size:
        raise InputError(f"--scenes {scenes} do not fill a batch of {batch_size}; give more scenes or a smaller batch.")
    for name, values in (("seeds", options.seeds), ("teacher-layer", options.teacher_layer)):
        if len(set(values)) < len(values):
            raise InputError(f"--{name} holds a value twice: {' '.join(map(str, values))}; give each once.")
    for layer in options.teacher_layer:
        if layer not in (-2, -1):
            raise InputError(f"--teacher-layer {layer} is not possible; give -2 (LLaVA's choice), -1 or both.")


def _choose(wanted: Sequence[str] | None, parts: "Parts") -> list[str]:
    """Return the wanted variants, or all."""
    known = parts.variants()
    for name in wanted or ():
        if name not in known:
            raise InputError(f"Variant '{name}' is unknown.{nearest(name, known)} Variants: {', '.join(known)}.")
    return list(wanted or known)


def _claim(out: Path, settings: "Settings") -> None:
    """Write down what a folder compares, or make sure that it compares just this."""
    from dataclasses import asdict

    from sf_mllm.config import write_text_atomically

    wanted = json.loads(json.dumps(asdict(settings)))
    file = out / "settings.json"
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        differing = sorted(name for name in wanted if found.get(name) != wanted[name])
        if differing:
            raise InputError(
                f"'{out}' holds a comparison with other settings (different: {', '.join(differing)}); "
                "give another --out."
            )
        return
    write_text_atomically(file, json.dumps(wanted, indent=1))


if __name__ == "__main__":
    sys.exit(main())
