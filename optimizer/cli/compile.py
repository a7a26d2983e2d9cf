"""`optimizer compile`."""

from __future__ import annotations

from pathlib import Path

import click

from optimizer.cli.arguments import shape_option
from optimizer.errors import ModelFileError

_EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "decoder" / "model.onnx"


@click.command(name="compile")
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("--target", "-t", default="host", show_default=True, help="Hardware target; see `optimizer targets`.")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), help="Package: a folder, or one file if it ends in .opt."
)
@shape_option
@click.option("--passes", help="Graph passes in order, with options: name,name{option=value}; see `optimizer passes`.")
@click.option(
    "--precision",
    type=click.Choice(["model", "fp32", "fp16", "bf16"]),
    default="model",
    show_default=True,
    help="What products and convolutions compute with, their sums being fp32; fp32: all of the model's 16-bit floats.",
)
@click.option(
    "--weights",
    type=click.Choice(["model", "int8", "int4"]),
    default="model",
    show_default=True,
    help="Round constant weights of products, and embeddings, to small integers.",
)
@click.option(
    "--weight-group",
    type=click.Choice(["16", "32", "64", "128", "0"]),
    default="32",
    show_default=True,
    help="Elements of a row that share a scale; 0: the whole row.",
)
@click.option(
    "--weight-method",
    type=click.Choice(["rtn", "minimum-error", "hqq", "awq", "gptq"]),
    default="rtn",
    show_default=True,
    help="Round to nearest, least squared error, HQQ; AWQ and GPTQ fit weights to their inputs (--calibration).",
)
@click.option(
    "--weight-zero-points/--no-weight-zero-points", default=None, help="Zero points for groups; by default for HQQ."
)
@click.option(
    "--weight-scales",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    default="float16",
    show_default=True,
    help="Type of the groups' scales.",
)
@click.option(
    "--weights-of",
    multiple=True,
    metavar="PATTERN=PRECISION",
    help="Weights of ONNX nodes with such names: int4, int8, or model (not rounded).",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A text, or an .npz of the model's inputs, to fit and judge weights by; by default text the model makes up.",
)
@click.option("--max-kl", type=float, help="The most KL divergence of outputs, in nats, that rounding may cause.")
@click.option("--max-flips", type=float, help="The largest share of likeliest tokens that rounding may change.")
@click.option(
    "--activations",
    type=click.Choice(["auto", "int8", "float"]),
    default="auto",
    show_default=True,
    help="What products with quantized weights compute in; auto: as the target does best.",
)
@click.option(
    "--log",
    type=click.Path(path_type=Path),
    help="Folder of tuning logs that decide schedules; by default those that come with the project.",
)
@click.option("--no-log", is_flag=True, help="Give every kernel its default schedule, whatever the logs say.")
@click.option("--tune", type=click.IntRange(1), metavar="N", help="Tune with N trials before compiling.")
@click.option(
    "--kv-cache",
    type=click.Choice(["in-place", "returned"]),
    default="in-place",
    show_default=True,
    help="Whether a decoder appends to buffers of keys and values, or takes and returns them with every step.",
)
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(["model", "fp32", "fp16", "bf16", "int8", "int4"]),
    default="model",
    show_default=True,
    help="What the buffers of keys and values hold; model: the type of the model's inputs.",
)
@click.option("--gpu-arch", "gpu_architectures", multiple=True, metavar="SM", help="CUDA architecture, such as sm_90.")
@click.option("--no-certificate", is_flag=True, help="Do not compare the package's outputs with a reference.")
@click.option("--explain", is_flag=True, help="Say of each pass and pair of kernels: rewritten, or refused and why.")
@click.option("--dump-ir", type=click.Path(path_type=Path), help="Folder for the module after each pass and step.")
@click.option("--dry-run", is_flag=True, help="Import, rewrite and schedule, but generate and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model: Path | None,
    target: str,
    output: Path | None,
    shapes: tuple[str, ...],
    passes: str | None,
    precision: str,
    weights: str,
    weight_group: str,
    weight_method: str,
    weight_zero_points: bool | None,
    weight_scales: str,
    weights_of: tuple[str, ...],
    calibration: tuple[Path, ...],
    max_kl: float | None,
    max_flips: float | None,
    activations: str,
    log: Path | None,
    no_log: bool,
    tune: int | None,
    kv_cache: str,
    kv_cache_dtype: str,
    gpu_architectures: tuple[str, ...],
    no_certificate: bool,
    explain: bool,
    dump_ir: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Compile an ONNX MODEL to a package for one hardware target.

    Without MODEL, compile the bundled example, a small decoder language model. The package appears only when it is
    complete and its outputs agree with a reference.
    """
    from optimizer.cli import compile_report, console
    from optimizer.cli.arguments import parse_shapes
    from optimizer.cli.tune import tune_before
    from optimizer.compile import CompileOptions, compile_model, find_target, plan_model
    from optimizer.tuning.log import SHIPPED
    from passes import pipeline

    model = _bundled_example() if model is None else model
    options = CompileOptions(
        find_target(target, gpu_architectures or None),
        parse_shapes(shapes),
        pipeline.DEFAULT if passes is None else passes,
        precision,
        dump_ir,
        weights,
        int(weight_group),
        weight_method,
        activations,
        None if no_log else log or SHIPPED,
        kv_cache,
        kv_cache_dtype,
        weight_zero_points=weight_zero_points,
        weight_scales=weight_scales,
        weights_of=weights_of,
        calibration=calibration,
        max_kl=max_kl,
        max_flips=max_flips,
    )
    if tune is not None:
        tune_before(model, options, tune, quiet=as_json)
    destination = output or Path(f"{_stem(model)}-{options.target.name}")
    if dry_run:
        with console.StageProgress(quiet=as_json) as progress:
            source, plan = plan_model(model, options, progress)
        compile_report.show_plan(source, plan, destination, as_json=as_json, explain=explain)
        return
    with console.StageProgress(quiet=as_json) as progress:
        result = compile_model(model, destination, options, progress, certify=not no_certificate)
    compile_report.show_result(result, destination, as_json=as_json, explain=explain)


def _bundled_example() -> Path:
    if not _EXAMPLE.exists():
        raise ModelFileError("the bundled example lies in the source checkout only; give an ONNX file")
    return _EXAMPLE


def _stem(model: Path) -> str:
    """Return a name for the package: the file's, or its folder's where the file is just called model.onnx."""
    return model.resolve().parent.name if model.stem == "model" else model.stem
