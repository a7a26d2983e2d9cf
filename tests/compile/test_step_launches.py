from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from optimizer.lowering import build, lower
from optimizer.package.manifest import SEVERAL_KERNELS
from passes.caches import ATTRIBUTE
from tests.schedules.execution import TARGET

_WIDTH, _LAYERS = 96, 5
_RNG = np.random.default_rng(0)
_WEIGHTS = [_RNG.standard_normal((_WIDTH, _WIDTH), np.float32) / 8 for _ in range(_LAYERS)]
_CACHE = [0, 0, 2, 0, 0, 0]
Layer = Callable[[relax.BlockBuilder, relax.Expr, int], relax.Expr]


def _residual(builder: relax.BlockBuilder, value: relax.Expr, layer: int) -> relax.Expr:
    """A product of normalized rows, normalized by columns and added to the rows.

    Kernels of one thread and of all, one of them with a loop over blocks of rows in its launch: one block, of one row.
    """
    normed = builder.emit(relax.op.nn.softmax(value, axis=-1))
    made = builder.emit(relax.op.matmul(normed, relax.const(_WEIGHTS[layer])))
    return builder.emit(relax.op.add(value, builder.emit(relax.op.nn.softmax(made, axis=0))))


def _module(layer: Layer, *, with_cache: bool = True) -> tvm.IRModule:
    """Return the scheduled `main` of x (n, width) that goes through all layers."""
    x = relax.Var("x", relax.TensorType([tirx.Var("n", "int64"), _WIDTH], "float32"))
    builder = relax.BlockBuilder()
    attributes = {ATTRIBUTE: [_CACHE]} if with_cache else {}
    with builder.function("main", [x], attrs=attributes):
        with builder.dataflow():
            value: relax.Expr = x
            for number in range(_LAYERS):
                value = layer(builder, value, number)
            result = builder.emit_output(value)
        builder.emit_func_output(result)
    return lower(builder.get(), TARGET).module


def _calls(executable: relax.VMExecutable) -> Counter[str]:
    lines = (line.split() for line in executable.as_text().splitlines())
    return Counter(words[1] for words in lines if words[:1] == ["call"])


def _result(executable: relax.VMExecutable, value: np.ndarray) -> np.ndarray:
    return relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(value)).numpy()


@pytest.fixture(scope="module")
def both_ways() -> tuple[relax.VMExecutable, relax.VMExecutable]:
    """The same layers, each in one launch where there is a single row, and each kernel in its own."""
    module = _module(_residual)
    return build(module, TARGET), build(module, TARGET, once_a_layer=False)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_layers_in_one_launch_compute_the_same_bits(
    both_ways: tuple[relax.VMExecutable, relax.VMExecutable], rows: int
) -> None:
    value = _RNG.standard_normal((rows, _WIDTH), np.float32)
    together, apart = (_result(each, value) for each in both_ways)
    np.testing.assert_array_equal(together, apart)


def test_each_layer_is_one_call_of_few_functions(both_ways: tuple[relax.VMExecutable, relax.VMExecutable]) -> None:
    together, apart = (
        [n for name, n in _calls(each).items() if name.startswith(SEVERAL_KERNELS)] for each in both_ways
    )
    assert not apart
    assert sum(together) == _LAYERS
    assert len(together) <= _LAYERS / 2


def test_layers_without_a_cache_stay_as_they_are() -> None:
    module = _module(_residual, with_cache=False)
    assert _calls(build(module, TARGET)) == _calls(build(module, TARGET, once_a_layer=False))
