"""`python -m optimizer.runtime PACKAGE INPUTS.npz OUTPUTS.npz`: run a package once, with nothing but the runtime."""

from __future__ import annotations

import sys

from optimizer.errors import OptimizerError
from optimizer.runtime import load
from optimizer.runtime.array_files import read_arrays, write_arrays


def main(package: str, inputs: str, outputs: str) -> None:
    """Run the main entry point on the arrays of one file and write the results to another."""
    model = load(package)
    write_arrays(outputs, model(read_arrays(inputs, model.entry("main").signature.inputs)))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python -m optimizer.runtime PACKAGE INPUTS.npz OUTPUTS.npz")
    try:
        main(*sys.argv[1:4])
    except OptimizerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
