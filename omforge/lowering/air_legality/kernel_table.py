"""Which kernel an operator gets on a SoC, as far as CANN 8.1.RC1 says."""

from __future__ import annotations

from omforge.air.kernels import FAMILIES, Kernel, kernel, listed
from omforge.lowering.target import Target

INFERRED_FROM = {"950": "910_93"}
"""Families whose tables 8.1 does not have, and the one that they are inferred from."""

_ABSENT_ON_950 = (
    "DequantRopeQuantKvcache FFN FatreluMul IncreFlashAttention InterleaveRope MoeFinalizeRouting "
    "PromptFlashAttention SplitD"
)
ABSENT = {"950": frozenset(_ABSENT_ON_950.split())}
"""Operators of the other family's table that the newest definitions do not add for this one.

Source: mirror-cann/ops-transformer, hicann/ops-nn and hicann/ops-math (op_host/*_def.cpp,
AddConfig).
"""

_NEWER_ON_310P = (
    "DynamicQuant DynamicQuantV2 MoeFinalizeRoutingV2 MoeGatingTopKSoftmax MoeInitRoutingV2 "
    "RotaryPositionEmbedding"
)
NEWER_KERNELS = {"310p": frozenset(_NEWER_ON_310P.split())}
"""Operators that the newest definitions add for a family, where CANN 8.1.RC1 has no kernel."""

_LOCAL = (
    "Data RefData Const Constant FileConstant NetOutput Reshape Squeeze SqueezeV2 SqueezeV3 "
    "Unsqueeze UnsqueezeV2 UnsqueezeV3 ExpandDims Flatten FlattenV2 Identity IdentityN Shape "
    "ShapeN Size Rank Bitcast ReFormat TransShape NoOp GatherShapes PhonyConcat PhonySplit If Case "
    "While PartitionedCall StatelessIf StatelessCase StatelessWhile StatefulPartitionedCall Merge"
)
LOCAL = frozenset(_LOCAL.split())
"""Operators that GE does itself, of any dtype: views, structure, what is known without a kernel.

Source: hicann/ge:compiler/engines/local_engine/ops_kernel_store/op (REGISTER_OP_CREATOR).
"""

_ON_THE_CPU = (
    "Add Cast Cumsum Div Elu Equal Exp GatherV2 Greater Less Log LogSoftmaxV2 Mul Neg Pow RealDiv "
    "ReduceMean ReduceSum ReverseSequence Round Rsqrt ScatterElements SelectV2 SoftmaxV2 SplitD "
    "SplitV Sqrt StridedSlice Sub Tan Tile"
)
ON_THE_CPU = frozenset(_ON_THE_CPU.split())
"""Operators that have a kernel for the AI CPU, too, which is slow and takes other dtypes.

Source: hicann/ops-math and hicann/ops-nn (op_kernel_aicpu).
"""


def table_family(target: Target) -> str | None:
    """Return the family whose table counts for a target; None where none does."""
    name = target.family.name
    stated = INFERRED_FROM.get(name, name)
    return stated if stated in FAMILIES.values() else None


def is_inferred(target: Target) -> bool:
    """Whether the table is that of another family."""
    return target.family.name in INFERRED_FROM


def kernel_for(op_type: str, target: Target) -> tuple[Kernel | None, str]:
    """Return the kernel of an operator, and a note where it is another family's."""
    name, family = target.family.name, table_family(target)
    note = f"; {name} has no table: {family}'s is read" if is_inferred(target) else ""
    if family is None or op_type in LOCAL or op_type in ABSENT.get(name, ()):
        return None, note
    return kernel(op_type, family), note


def has_none(op_type: str, target: Target) -> bool:
    """Whether a table is about this operator, and has no kernel of it for the target's family."""
    if table_family(target) is None or op_type in LOCAL or not listed(op_type):
        return False
    return kernel_for(op_type, target)[0] is None


def is_newer(op_type: str, target: Target) -> bool:
    """Whether releases behind CANN 8.1.RC1 have a kernel that it has not."""
    return op_type in NEWER_KERNELS.get(target.family.name, ())
