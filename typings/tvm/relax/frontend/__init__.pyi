# TVM's Python objects get their fields from C++ at run time; to the type checker they are untyped.
from typing import Any

def __getattr__(name: str) -> Any: ...
