from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from passes.block_channels import BlockChannels
from passes.integer_convolutions import border_of
from tests.passes.test_block_channels import kernels


def convolution(data: str, weights: relax.Expr | None, integers: str) -> list[str | None]:
    """Return the reasons why the only convolution of a module stays as it is, None where it does not."""
    builder = relax.BlockBuilder()
    inputs = [relax.Var("x", relax.TensorType([1, 16, 5, 5], data))]
    if weights is None:
        inputs.append(relax.Var("w", relax.TensorType([16, 16, 3, 3], "int8")))
    with builder.function("main", inputs):
        with builder.dataflow():
            call = op.nn.conv2d(inputs[0], inputs[-1] if weights is None else weights, out_dtype="int32")
            output = builder.emit_output(call)
        builder.emit_func_output(output)
    return [site.refusal for site in BlockChannels(integers=integers).run(builder.get()).sites]


def filters(dtype: str, outputs: int = 16) -> relax.Expr:
    return relax.const(np.ones((outputs, 16, 3, 3), dtype))


@pytest.mark.parametrize(
    ("data", "weights", "integers", "reason"),
    [
        ("uint8", filters("int8"), "uint8", None),
        ("uint8", filters("int8", outputs=3), "uint8", None),
        ("int8", filters("int8"), "uint8", "its data are int8, where the target multiplies uint8"),
        ("uint8", filters("uint8"), "uint8", "its weights are uint8, not int8"),
        ("uint8", None, "uint8", "the weights are not constant"),
        ("uint8", filters("int8"), "", "the target has no dot products of bytes"),
    ],
)
def test_convolutions_of_the_targets_bytes_are_blocked(
    data: str, weights: relax.Expr | None, integers: str, reason: str | None
) -> None:
    assert convolution(data, weights, integers) == [reason]


@pytest.mark.parametrize(("value", "written"), [(0, []), (7, ["border"])])
def test_a_border_is_written_out_only_where_it_is_not_zero(value: int, written: list[str]) -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([1, 16, 5, 5], "uint8"))
    with builder.function("main", [x]):
        with builder.dataflow():
            padded = builder.emit(op.nn.pad(x, [0, 0, 0, 0, 1, 1, 1, 1], "constant", value))
            output = builder.emit_output(op.nn.conv2d(padded, filters("int8"), out_dtype="int32"))
        builder.emit_func_output(output)
    found = kernels(BlockChannels(integers="uint8").run(builder.get()).module)
    assert found == ["to_blocks", *written, "conv2d", "from_blocks"]


def test_bytes_become_words_once_and_are_narrowed_for_others() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([1, 16, 5, 5], "uint8"))
    with builder.function("main", [x]):
        with builder.dataflow():
            sums = op.nn.conv2d(x, filters("int8"), padding=1, out_dtype="int32")
            codes = builder.emit(op.astype(op.nn.relu(sums), "uint8"))
            first, second = (
                builder.emit(op.nn.conv2d(codes, filters("int8"), padding=1, out_dtype="int32")) for _ in range(2)
            )
            output = builder.emit_output(op.add(op.add(first, second), op.astype(codes, "int32")))
        builder.emit_func_output(output)
    found = kernels(BlockChannels(integers="uint8", words=True).run(builder.get()).module)
    words = ["astype", "conv2d"]
    assert found == [
        "to_blocks",
        *words,
        "nn.relu",
        "astype",
        *words,
        "conv2d",
        "add",
        *["astype"] * 2,
        "add",
        "from_blocks",
    ]


def test_only_a_constant_around_the_image_is_a_border() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([1, 16, 5, 5], "uint8"))

    def border(widths: list[int], mode: str = "constant") -> object:
        call = builder.normalize(op.nn.pad(x, widths, mode, 3))
        assert isinstance(call, tvm.ir.Call)
        return border_of(call)

    with builder.function("main", [x]):
        found = border([0, 0, 0, 0, 1, 2, 0, 4])
        others = [border([0, 0, 1, 0, 1, 1, 1, 1]), border([0, 0, 0, 0, 1, 1, 1, 1], "reflect")]
        builder.emit_func_output(x)
    assert found is not None
    assert others == [None, None]
