"""The operator families of CPU targets, in the order in which they are asked."""

from __future__ import annotations

from schedules.convolution import Convolution
from schedules.elementwise import Elementwise
from schedules.family import Family
from schedules.matmul import Matmul
from schedules.reduction import Reduction
from schedules.rowwise import Rowwise

FAMILIES: tuple[Family, ...] = (Convolution(), Matmul(), Rowwise(), Reduction(), Elementwise())
