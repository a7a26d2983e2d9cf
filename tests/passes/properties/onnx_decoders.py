"""Decoders with caches of tokens as inputs, extended in one of many ways, some of which are no appending."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser
from hypothesis import strategies as st

from tests.passes.properties.onnx_graphs import Draw, Generated

NEW, PAST = "new", "past"


@dataclass(frozen=True)
class _Cache:
    """A cache of `heads` and `width` with tokens on `axis`, whose length has a symbol of its own or a shared one."""

    number: int
    axis: int
    heads: int
    width: int
    length: str
    made: str
    extended: str
    read: str

    def shape(self, tokens: str) -> str:
        places = [str(self.heads), str(self.heads), str(self.width)]
        places[self.axis - 1] = tokens
        return ",".join(["batch", *places])

    def nodes(self) -> list[str]:
        p, a, e, n = (f"{name}{self.number}" for name in ("p", "a", "e", "n"))
        made = {"given": f"{n} = Identity({a})", "computed": f"{n} = Neg({a})", "squared": f"{n} = Mul({a}, {a})"}
        extended = {
            "behind": f"{e} = Concat<axis={self.axis}>({p}, {n})",
            "behind, from the end": f"{e} = Concat<axis={self.axis - 4}>({p}, {n})",
            "before": f"{e} = Concat<axis={self.axis}>({n}, {p})",
            "twice": f"{e} = Concat<axis={self.axis}>({p}, {n}, {n})",
        }
        return [made[self.made], extended[self.extended], *self._read(p, e)]

    def _read(self, past: str, extended: str) -> list[str]:
        r = f"r{self.number}"
        return {
            "present": [f"{r} = Exp({extended})"],
            "summed": [f"{r}s = ReduceSum<keepdims=0>({extended})", f"{r} = Neg({r}s)"],
            "past": [f"{r}p = ReduceSum<keepdims=0>({past})", f"{r} = Neg({r}p)"],
            "turned": [f"{r}t = Transpose<perm=[0,3,1,2]>({extended})", f"{r} = Tanh({r}t)"],
        }[self.read]


@st.composite
def decoders(draw: Draw) -> Generated:
    """Draw a model of one to three caches with arrays for its inputs."""
    caches = [
        _Cache(
            number,
            draw(st.sampled_from([1, 2])),
            draw(st.integers(1, 3)),
            draw(st.integers(1, 4)),
            draw(st.sampled_from([PAST, PAST, f"{PAST}{number}"])),
            draw(st.sampled_from(["given", "computed", "squared"])),
            draw(st.sampled_from(["behind"] * 4 + ["behind, from the end", "before", "twice"])),
            draw(st.sampled_from(["present"] * 4 + ["summed", "turned", "past"])),
        )
        for number in range(draw(st.integers(1, 3)))
    ]
    inputs = [f"float[{c.shape(c.length)}] p{c.number}, float[{c.shape(NEW)}] a{c.number}" for c in caches]
    returned = [cache for cache in caches if draw(st.sampled_from([True, True, True, False]))]
    outputs = [*(f"float[] r{c.number}" for c in caches), *(f"float[] e{c.number}" for c in returned)]
    nodes = "\n".join(node for cache in caches for node in cache.nodes())
    header = '<ir_version: 8, opset_import: ["" : 17]>'
    model = onnx.parser.parse_model(f"{header} decoder ({', '.join(inputs)}) => ({', '.join(outputs)}) {{ {nodes} }}")
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    extents = {name: draw(st.sampled_from([0, 1, 2, 5])) for name in dict.fromkeys(c.length for c in caches)}
    extents |= {"batch": draw(st.integers(1, 2)), NEW: draw(st.integers(1, 3))}
    return Generated(model, _arrays(model, extents, draw(st.integers(0, 99))))


def _arrays(model: onnx.ModelProto, extents: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for value in model.graph.input:
        shape = [extents[d.dim_param] if d.dim_param else d.dim_value for d in value.type.tensor_type.shape.dim]
        arrays[value.name] = rng.standard_normal(shape, dtype=np.float32)
    return arrays
