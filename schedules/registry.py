"""The operator families of CPU targets, in the order in which they are asked, and the rules of GPUs in their place."""
# Each family has an analysis type of its own, which only the family itself looks into: hence Any.

from __future__ import annotations

from typing import Any

from schedules import cuda
from schedules.attention import Attention
from schedules.channel_chain import ChannelChain
from schedules.convolution import Convolution
from schedules.depthwise_bytes import DepthwiseBytes
from schedules.direct_convolution import DirectConvolution
from schedules.elementwise import Elementwise
from schedules.family import Family
from schedules.gated_product import GatedProduct
from schedules.matmul import Matmul
from schedules.matrix_convolution import MatrixConvolution
from schedules.narrow_rows import NarrowRows
from schedules.normalized_product import NormalizedProduct
from schedules.pooling import Pooling
from schedules.product_chain import ProductChain
from schedules.quantized_matmul import QuantizedMatmul
from schedules.reduction import Reduction
from schedules.rowwise import Rowwise
from schedules.static_gather import StaticGather
from schedules.transpose import Transpose
from schedules.winograd import Winograd

FAMILIES: tuple[Family[Any], ...] = (
    NormalizedProduct(),
    ProductChain(),
    GatedProduct(),
    Attention(),
    ChannelChain(),
    Winograd(),
    DepthwiseBytes(),
    MatrixConvolution(),
    DirectConvolution(),
    QuantizedMatmul(),
    Pooling(),
    Convolution(),
    Matmul(),
    NarrowRows(),
    Rowwise(),
    Reduction(),
    Transpose(),
    StaticGather(),
    Elementwise(),
)


def versions(device: str) -> dict[str, int]:
    """Return the families of kernels for a kind of device ("cpu", "cuda"), and the version of each one's parameters."""
    if device == "cuda":
        return dict.fromkeys(cuda.RULES, cuda.VERSION)
    return {family.name: family.version for family in FAMILIES}
