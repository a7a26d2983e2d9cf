"""Values of options that several commands read: shapes, symbols, arrays from files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from optimizer.errors import InputMismatchError, OptionError

if TYPE_CHECKING:
    import numpy as np


shape_option = click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="NAME=DIMS",
    help="Shape of an input, such as x=1,3,224,224; its sizes hold for inputs with the same names of dimensions, too.",
)


def parse_shapes(texts: tuple[str, ...]) -> dict[str, list[int | str]]:
    """Return shapes by input name from texts such as `x=1,3,224,224` (a name keeps a dimension dynamic).

    Raises OptionError.
    """
    shapes: dict[str, list[int | str]] = {}
    for text in texts:
        name, separator, dimensions = text.rpartition("=")
        if not separator or not name:
            raise OptionError(f"--shape '{text}' is not of the form NAME=DIM,DIM,... (such as x=1,3,224,224)")
        shapes[name] = [_dimension(text, part.strip()) for part in dimensions.split(",") if part.strip()]
    return shapes


def _dimension(text: str, part: str) -> int | str:
    if part.lstrip("-").isdigit():
        if int(part) < 0:
            raise OptionError(f"--shape '{text}': a dimension cannot be negative; give a name to keep it dynamic")
        return int(part)
    return part


def parse_symbols(texts: tuple[str, ...]) -> dict[str, int]:
    """Return values of symbolic dimensions from texts such as `batch=4`; raises OptionError."""
    symbols: dict[str, int] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not name or not value.isdigit():
            raise OptionError(f"--dim '{text}' is not of the form NAME=SIZE (such as batch=4)")
        symbols[name] = int(value)
    return symbols


def read_arrays(texts: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return arrays from `NAME=FILE.npy` texts and from `FILE.npz` texts (all arrays of the file, by name).

    Raises OptionError for a malformed text, InputMismatchError for a file that holds no arrays.
    """
    arrays: dict[str, np.ndarray] = {}
    for text in texts:
        name, separator, file = text.rpartition("=")
        path = Path(file)
        if not path.is_file():
            raise OptionError(f"--input '{text}': {path} does not exist; give NAME=FILE.npy or FILE.npz")
        if not separator and path.suffix != ".npz":
            raise OptionError(f"--input '{text}' does not say which input it is; write NAME={text}")
        arrays.update(_load(path, name))
    return arrays


def _load(path: Path, name: str) -> dict[str, np.ndarray]:
    import numpy as np

    try:
        content = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputMismatchError(f"{path}: holds no numpy array ({error})") from error
    if isinstance(content, np.ndarray):
        return {name: content}
    with content:
        return {key: content[key] for key in content.files}
