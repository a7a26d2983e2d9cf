"""`optimizer run`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(name="run")
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--input", "-i", "inputs", multiple=True, metavar="NAME=FILE", help="Input from .npy, or all from .npz.")
@click.option("--dim", "dims", multiple=True, metavar="NAME=SIZE", help="Symbolic dimension of random inputs.")
@click.option("--seed", default=0, show_default=True, help="Seed of random inputs.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write the outputs to this .npz file.")
@click.option("--device", help="cpu, cuda or cuda:N; by default what the package was compiled for.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; by default one per physical core.")
@click.option("--json", "as_json", is_flag=True, help="Print the outputs' summary as JSON.")
def command(
    package: Path,
    inputs: tuple[str, ...],
    dims: tuple[str, ...],
    seed: int,
    output: Path | None,
    device: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Run PACKAGE once on given inputs; inputs that are not given are random."""
    import numpy as np

    from optimizer.cli.arguments import parse_symbols, read_arrays
    from optimizer.cli.console import print_table
    from optimizer.cli.plain_text import print_json
    from optimizer.report.inputs import complete_inputs
    from optimizer.runtime import load

    model = load(package, device=device, threads=threads)
    arrays = complete_inputs(model.manifest, read_arrays(inputs), parse_symbols(dims), seed)
    results = model(arrays)
    if output is not None:
        np.savez(output, **results)  # pyright: ignore[reportArgumentType] -- names are keywords of savez
    rows = [_summary(name, array) for name, array in results.items()]
    if as_json:
        print_json(
            [dict(zip(("name", "dtype", "shape", "minimum", "mean", "maximum"), row, strict=True)) for row in rows]
        )
    else:
        print_table(str(package), ("output", "dtype", "shape", "min", "mean", "max"), rows)


def _summary(name: str, array: object) -> tuple[str, str, str, str, str, str]:
    import numpy as np

    values = np.asarray(array)
    shape = "x".join(map(str, values.shape)) or "scalar"
    if values.size == 0:
        return name, values.dtype.name, shape, "-", "-", "-"
    numbers = values.astype(np.float64)
    least, mean, most = (f"{function(numbers):.6g}" for function in (np.min, np.mean, np.max))
    return name, str(values.dtype), shape, least, mean, most
