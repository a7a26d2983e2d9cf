"""Two products of the same rows, one behind the other, in one kernel: the two of a transformer's feed-forward part.

A task computes its block of rows of the first product, all columns of them, and what the second one makes of them while
they lie in its own cache: the wide matrix between the two, mostly four times as wide as the others, is never stored
whole. Normalizations before the first product and behind the second one belong to the kernel as they do to one product.

Each task reads all weights. It pays where these and its rows fit the second-level cache, for then a product of few
terms, done in less time than memory takes for its result, does not wait for it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tvm.tirx.stmt import Stmt

from schedules.access import AxisGroup
from schedules.family import Choice, Kernel, Parameters, Space
from schedules.intrin.matrix_tiles import BLOCK
from schedules.kernels import is_of_matrices
from schedules.loops import product
from schedules.matmul import Matmul, MatmulAnalysis, matrix_operands, other_operand
from schedules.normalized_product import (
    MOST_ROWS_OF_BLOCK,
    ROWS_TO_OWN,
    NormalizedProduct,
    Part,
    in_blocks_of_rows,
    is_row,
    same_rows,
    with_instructions,
)
from schedules.register_tile import register_tile
from schedules.row_parts import PartedKernel, before_product, behind_product, is_product
from schedules.rowwise import RowwiseAnalysis
from schedules.stages import Stage, StagedFunction, contains
from targets.base import Target

# Of the second-level cache, what the weights and a block's rows may take; the rest passes through.
KEPT = 4, 5


@dataclass(frozen=True, eq=False)
class ProductChainKernel(Kernel):
    """Two products, each with the functions of rows on its side; the second one multiplies what the first one makes."""

    links: tuple[PartedKernel, ...] = ()

    @property
    def parts(self) -> tuple[Kernel, ...]:
        """All parts in order of execution."""
        return tuple(part for link in self.links for part in link.parts)

    @property
    def ends_with_product(self) -> bool:
        return len(self.links[1].parts) == 1


@dataclass(frozen=True, eq=False)
class ProductChainAnalysis:
    """The parts in order of execution, and the two products among them."""

    parts: tuple[Part, ...]
    products: tuple[MatmulAnalysis, MatmulAnalysis]


@functools.lru_cache(maxsize=1024)
def whole(staged: StagedFunction) -> ProductChainKernel | None:
    """Return a function of two products, the second of the first one's result, as one kernel; None otherwise."""
    stages = [stage for stage in staged.stages if isinstance(stage, Stage)]
    products = [position for position, stage in enumerate(stages) if is_product(stage)]
    if len(stages) != len(staged.stages) or len(products) != 2:
        return None
    if not all(is_of_matrices(stages[position]) for position in products):
        return None
    second = products[1]
    between = stages[second - 1].output
    others = [stage for stage in stages[second + 1 :] if contains([load.source for load in stage.loads()], between)]
    if not contains(staged.intermediate, between) or others:
        return None
    links = before_product(staged, stages[:second]), behind_product(staged, stages[second:])
    if links[0] is None or links[1] is None:
        return None
    every = tuple(stage for link in links if link is not None for stage in link.stages)
    private = (between, *(buffer for link in links if link is not None for buffer in link.private))
    return ProductChainKernel(every, private, links=(links[0], links[1]))


class ProductChain:
    """Two register-tiled products in one parallel loop over blocks of rows."""

    name = "product-chain"
    version = 1

    def takes(self, kernel: Kernel, target: Target) -> ProductChainAnalysis | None:
        """Return the analysis of two products with packed weights whose rows between them a core's cache holds."""
        if not isinstance(kernel, ProductChainKernel) or self.refusal(kernel, target) is not None:
            return None
        return _analysis(kernel, target)

    def refusal(self, kernel: ProductChainKernel, target: Target) -> str | None:
        """Return why the products are better kernels of their own; None where they make one."""
        if target.multiply_adds == 1:
            return "products take the target longer than memory takes for their results"
        for link in kernel.links:
            reason = NormalizedProduct().refusal(link, target)
            if reason is not None:
                return reason
        analysis = _analysis(kernel, target)
        if analysis is None or len({matrix_operands(each, target) is None for each in analysis.products}) != 1:
            return "the products are not both of constant matrices and of rows of known number"
        if not _follow(analysis):
            return "a row of the second product needs more than that row of the first one"
        if _rows_of_block(target, analysis) == 0:
            return "the rows are few, or the weights more than the second-level cache holds"
        return None

    def space(self, target: Target, analysis: ProductChainAnalysis) -> Space:
        """Return the parameters of the products, the rows of a block, and the vectors of a statement on rows."""
        own = [choice for choice in Matmul().space(target, analysis.products[0]) if choice.name in ("rows", "vectors")]
        return (
            *own,
            Choice("owned_rows", _rows_of_block(target, analysis), (32, 64, 96, 128, 256)),
            Choice("row_vectors", 2, (1, 2, 4)),
        )

    def apply(self, analysis: ProductChainAnalysis, parameters: Parameters, target: Target) -> Stmt:
        """Return the parallel loop over blocks of rows."""
        result = in_blocks_of_rows(analysis.parts, parameters, target)
        return with_instructions(analysis.parts, result, target)


def _analysis(kernel: ProductChainKernel, target: Target) -> ProductChainAnalysis | None:
    """Return the analysis of two products of packed matrices whose sizes are known; None of others."""
    links = [NormalizedProduct().takes(link, target) for link in kernel.links]
    parts = tuple(part for link in links if link is not None for part in link.parts)
    products = [part for part in parts if isinstance(part, MatmulAnalysis)]
    if None in links or len(products) != 2 or not all(map(_is_of_known_size, products)):
        return None
    return ProductChainAnalysis(parts, (products[0], products[1]))


def _is_of_known_size(contraction: MatmulAnalysis) -> bool:
    groups = [contraction.rows, contraction.columns, *contraction.reduction]
    known = all(group is not None and isinstance(group.extent, int) for group in groups)
    return known and contraction.block > 0 and not contraction.outer and len(contraction.stage.loads()) == 2


def _follow(analysis: ProductChainAnalysis) -> bool:
    """Return whether each part reads of the earlier ones only the row that it computes."""
    first, second = analysis.products
    around = [part for part in analysis.parts if isinstance(part, RowwiseAnalysis)]
    if not all(same_rows((*around, contraction), contraction) for contraction in analysis.products):
        return False
    read, made = other_operand(second.stage, second.operand), first.epilogue
    if not read.source.same_as(made.stage.output) or first.rows is None or second.rows is None:
        return False
    leading = len(read.indices) - 1
    sizes = [[axis.extent for axis in group.axes] for group in (first.rows, second.rows)]
    places = is_row(made.indices, leading, first.rows), is_row(read.indices, leading, second.rows)
    return sizes[0] == sizes[1] and all(places)


def _rows_of_block(target: Target, analysis: ProductChainAnalysis) -> int:
    """Return the rows of a task that leave every core equally many; 0 where they are few, or do not fit the cache."""
    first, second = analysis.products
    rows = _extent(first.rows)
    room = target.caches.level2 * KEPT[0] // KEPT[1] - sum(_bytes_of_weights(each) for each in analysis.products)
    height = register_tile(target)[0] if matrix_operands(first, target) is None else BLOCK
    most = min(MOST_ROWS_OF_BLOCK, room // max(1, _bytes_of_row(first) + _bytes_of_row(second))) // height * height
    if rows < target.cores * ROWS_TO_OWN or most < MOST_ROWS_OF_BLOCK // 2:
        return 0
    tasks = target.cores * -(-rows // (target.cores * most))
    return -(-rows // (tasks * height)) * height


def _bytes_of_weights(contraction: MatmulAnalysis) -> int:
    bits = int(contraction.operand.source.dtype.bits)
    return _depth(contraction) * _extent(contraction.columns) * bits // 8


def _bytes_of_row(contraction: MatmulAnalysis) -> int:
    """Return the bytes of a row that a product reads."""
    return _depth(contraction) * int(other_operand(contraction.stage, contraction.operand).source.dtype.bits) // 8


def _depth(contraction: MatmulAnalysis) -> int:
    depth = product([group.extent for group in contraction.reduction])
    assert isinstance(depth, int)
    return depth


def _extent(group: AxisGroup | None) -> int:
    assert group is not None
    assert isinstance(group.extent, int)
    return group.extent
