"""`optimizer bench`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(name="bench")
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--input", "-i", "inputs", multiple=True, metavar="NAME=FILE", help="Input from .npy, or all from .npz.")
@click.option("--dim", "dims", multiple=True, metavar="NAME=SIZE", help="Symbolic dimension of random inputs.")
@click.option("--seconds", default=3.0, show_default=True, help="How long to measure.")
@click.option("--device", help="cpu, cuda or cuda:N; by default what the package was compiled for.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; by default one per physical core.")
@click.option("--no-mmap", is_flag=True, help="Read the weights into this process's memory, in huge pages.")
@click.option("--kernels", is_flag=True, help="Also measure each kernel, and name its ONNX nodes (CPU alone).")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(
    package: Path,
    inputs: tuple[str, ...],
    dims: tuple[str, ...],
    seconds: float,
    device: str | None,
    threads: int | None,
    no_mmap: bool,
    kernels: bool,
    as_json: bool,
) -> None:
    """Measure PACKAGE: time to load, time per call with its spread, and peak memory. Inputs not given are random."""
    import dataclasses
    import time

    from optimizer.cli.arguments import parse_symbols, read_arrays
    from optimizer.cli.console import print_facts, print_table, progress_bar
    from optimizer.cli.plain_text import bytes_text, print_json, seconds_text
    from optimizer.errors import OptionError
    from optimizer.report.inputs import complete_inputs
    from optimizer.report.kernel_times import kernel_times
    from optimizer.report.memory import peak_resident_bytes
    from optimizer.report.timing import measure
    from optimizer.runtime import load

    start = time.perf_counter()
    model = load(package, device=device, threads=threads, mapped=not no_mmap)
    load_seconds = time.perf_counter() - start
    if kernels and model.manifest.requirements.device != "cpu":
        raise OptionError("kernels of a GPU run on while the next is called; measure them with its own profiler")
    arrays = complete_inputs(model.manifest, read_arrays(inputs), parse_symbols(dims), seed=0)
    shapes = {name: list(array.shape) for name, array in arrays.items()}
    with progress_bar("measuring", 1000, quiet=as_json) as advance:
        timing = measure(lambda: model(arrays, outputs="dlpack"), seconds=seconds, most_runs=1000, after=advance)
    peak = peak_resident_bytes()
    runs = max(1, min(timing.runs, 100))
    times = kernel_times(model, lambda: model(arrays, outputs="dlpack"), runs=runs) if kernels else ()
    if as_json:
        print_json(
            {
                "package": str(package),
                "shapes": shapes,
                "threads": model.threads,
                "load_seconds": load_seconds,
                "median_seconds": timing.median,
                "p10_seconds": timing.low,
                "p90_seconds": timing.high,
                "runs": timing.runs,
                "peak_resident_bytes": peak,
                **({"kernels": [dataclasses.asdict(kernel) for kernel in times]} if kernels else {}),
            }
        )
        return
    facts = [
        ("inputs", ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in shapes.items())),
        ("threads", str(model.threads)),
        ("load", seconds_text(load_seconds)),
        (
            "time per call",
            f"median {seconds_text(timing.median)}, 10 % {seconds_text(timing.low)}, "
            f"90 % {seconds_text(timing.high)}, {timing.runs} calls",
        ),
        ("peak memory", bytes_text(peak)),
    ]
    print_facts(str(package), facts)
    if kernels:
        total = sum(kernel.seconds for kernel in times) or 1.0
        rows = [
            (k.name, k.family, str(k.calls), seconds_text(k.seconds), f"{k.seconds / total:.1%}", ", ".join(k.nodes))
            for k in times
        ]
        print_table("\nkernels", ("name", "family", "calls", "time", "share", "ONNX nodes"), rows)
