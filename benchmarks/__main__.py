"""`python -m benchmarks vision|encoders|kernels`: tables of this compiler beside other engines, as Markdown."""

from __future__ import annotations

import datetime
import platform
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import click
import numpy as np
import onnx

from benchmarks.comparison import Row, compare
from benchmarks.engines import ENGINES
from benchmarks.kernels import cases
from benchmarks.models import model_path

_SEED = 0


# What integer inputs hold: values below the bound, or ones where the bound is None.
_BOUNDS: dict[str, int | None] = {"input_ids": 30000, "token_type_ids": 2, "attention_mask": None}

# The engines that kernels are compared with; stock TVM's unscheduled loops would take the time of all others together.
_PEERS = ("optimizer", "onnxruntime", "openvino")

TABLES = {
    "vision": ("resnet_50", "mobilenet_v2", "convnext_tiny", "efficientnet_b0", "vit_base_16", "swin_tiny"),
    "encoders": ("bert_base", "distilbert_base", "whisper_tiny_encoder"),
}


@click.command()
@click.argument("table", type=click.Choice([*TABLES, "kernels"]))
@click.option("--model", "models", multiple=True, help="Only this model (of kernels also conv*); may be repeated.")
@click.option("--engine", "engines", multiple=True, type=click.Choice([*ENGINES, "peak"]), help="Only these engines.")
@click.option("--threads", type=click.IntRange(1), help="Threads of every engine; default: one per physical core.")
@click.option("--rounds", default=5, show_default=True, help="How often all engines take their turn.")
def main(table: str, models: tuple[str, ...], engines: tuple[str, ...], threads: int | None, rounds: int) -> None:
    """Compare this compiler with other engines on the models of TABLE, interleaved in one run."""
    from optimizer.runtime.machine import default_thread_count  # noqa: PLC0415

    threads = threads or default_thread_count()
    chosen = engines or ((*_PEERS, "peak") if table == "kernels" else tuple(ENGINES))
    click.echo(
        f"{datetime.date.today()}, {_cpu()}, {threads} threads, `{' '.join(['python -m benchmarks', *sys.argv[1:]])}`\n"
    )
    click.echo("| model | engine | ms | spread | time / ours | compile s | resident MB | max difference |")
    click.echo("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="optimizer-bench-") as folder:
        for model, path in _models(table, models, Path(folder)):
            if not path.exists():
                click.echo(f"| {model} | not made: run `python -m benchmarks.models {model}` |||||||")
                continue
            rows = compare(path, _inputs(path), chosen, threads=threads, rounds=rounds, reference="onnxruntime")
            for row in rows:
                click.echo(_line(model, row, rows[0].median))


def _models(table: str, only: tuple[str, ...], folder: Path) -> Iterator[tuple[str, Path]]:
    """Return names and files of the table's models; those of single kernels are written to `folder`."""
    if table == "kernels":
        chosen = [case for case in cases() if not only or any(fnmatch(case.name, pattern) for pattern in only)]
        yield from ((case.name, case.save(folder)) for case in chosen)
    else:
        yield from ((model, model_path(model)) for model in TABLES[table] if not only or model in only)


def _inputs(model: Path) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(_SEED)
    arrays: dict[str, np.ndarray] = {}
    for declared in onnx.load(model, load_external_data=False).graph.input:
        shape = tuple(dimension.dim_value for dimension in declared.type.tensor_type.shape.dim)
        if declared.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            arrays[declared.name] = generator.standard_normal(shape, dtype=np.float32)
        else:
            bound = _BOUNDS[declared.name]
            arrays[declared.name] = np.ones(shape, np.int64) if bound is None else generator.integers(0, bound, shape)
    return arrays


def _line(model: str, row: Row, ours: float) -> str:
    if row.error is not None:
        return f"| {model} | {row.engine} | {row.error} ||||||"
    if row.engine == "peak":
        return f"| {model} | peak | {row.median * 1e3:.2f} | ±{row.spread:.0%} | {row.median / ours:.2f} ||||"
    return (
        f"| {model} | {row.engine} {row.version} | {row.median * 1e3:.2f} | ±{row.spread:.0%} "
        f"| {row.median / ours:.2f} | {row.compile_seconds:.1f} | {row.resident_bytes / 1e6:.0f} "
        f"| {row.difference:.1e} |"
    )


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
