"""`python -m optimizer`."""

import sys

try:
    from optimizer.cli import main
except ModuleNotFoundError as error:
    if error.name != "click":
        raise
    sys.exit("error: the Python package 'click' is not installed; `pip install .` does it")

main()
