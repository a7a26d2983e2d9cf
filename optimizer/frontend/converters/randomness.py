"""Operators that draw random numbers: refused, because no two runs and no reference would agree on them."""

from __future__ import annotations

from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter


@converter("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")
def random_numbers(node: Node) -> Result:
    """Refuse the operator."""
    raise node.unsupported("random numbers cannot be reproduced; draw them outside of the model and make them an input")
