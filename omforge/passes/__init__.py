"""The passes: one file each, and nothing else.

`PASSES` is every pass of ours by name, `PIPELINES` every pipeline as text; `make_pipeline("raise")`
or `make_pipeline("canonicalize,fuse-rms-norm")` makes one to run. `ALL_PASSES` and `ALL_PIPELINES`
have those of plugins, too.
"""

import inspect

from omforge.ir.errors import InputError
from omforge.passes.add_past import AddPast
from omforge.passes.bind_choices import BindChoices
from omforge.passes.bind_memory import BindMemory
from omforge.passes.bind_shapes import BindShapes
from omforge.passes.cache_in_place import CacheInPlace
from omforge.passes.canonicalize_cache import CanonicalizeCache
from omforge.passes.convert_opset import ConvertOpset
from omforge.passes.convert_precision import ConvertPrecision
from omforge.passes.dense_experts import DenseExperts
from omforge.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from omforge.passes.fold_constants import FoldConstants
from omforge.passes.fold_defaults import FoldDefaults
from omforge.passes.fold_shapes import FoldShapes
from omforge.passes.fuse_attention import FuseAttention
from omforge.passes.fuse_encoder_io import FuseEncoderIo
from omforge.passes.fuse_gelu import FuseGelu
from omforge.passes.fuse_kv_io import FuseKvIo
from omforge.passes.fuse_layer_norm import FuseLayerNorm
from omforge.passes.fuse_rms_norm import FuseRmsNorm
from omforge.passes.fuse_rotary import FuseRotary
from omforge.passes.fuse_swish import FuseSwish
from omforge.passes.graphsurgeon_pass import GraphSurgeonPass
from omforge.passes.group_query_attention import GroupQueryAttention
from omforge.passes.grow_static_cache import GrowStaticCache
from omforge.passes.inline_functions import InlineFunctions
from omforge.passes.last_token_logits import LastTokenLogits
from omforge.passes.matmul_nbits import MatmulNbits
from omforge.passes.merge_slices import MergeSlices
from omforge.passes.name_dims import NameDims
from omforge.passes.one_hot_choices import OneHotChoices
from omforge.passes.onnxsim import Onnxsim
from omforge.passes.quantize_activations import QuantizeActivations
from omforge.passes.quantize_kv import QuantizeKv
from omforge.passes.quantize_weights import QuantizeWeights
from omforge.passes.raise_contrib_ops import RaiseContribOps
from omforge.passes.remove_no_ops import RemoveNoOps
from omforge.passes.sign_weights import SignWeights
from omforge.passes.tabulate_rotary import TabulateRotary
from omforge.passes.take_branches import TakeBranches
from omforge.passes.take_choices import TakeChoices
from omforge.passes.text_positions import TextPositions
from omforge.passes.turn_weights import TurnWeights
from omforge.passes.uncrop_cache import UncropCache
from omforge.passes.unflatten_gemm import UnflattenGemm
from omforge.passes.ungroup_experts import UngroupExperts
from omforge.plugins import Registry
from omforge.rewriting.base import Pass, require_options
from omforge.rewriting.events import Event
from omforge.rewriting.pass_run import PassRun
from omforge.rewriting.pipeline import Pipeline, PipelineResult
from omforge.rewriting.pipeline_text import parse_pipeline
from omforge.rewriting.rewrite import ANY, Builder, Match, NoMatch, Pat, PatternOps, RewritePass

__all__ = [
    "ALL_PASSES",
    "ALL_PIPELINES",
    "ANY",
    "PASSES",
    "PIPELINES",
    "Builder",
    "Event",
    "GraphSurgeonPass",
    "Match",
    "NoMatch",
    "Pass",
    "PassRun",
    "Pat",
    "PatternOps",
    "Pipeline",
    "PipelineResult",
    "RewritePass",
    "make_pipeline",
    "parse_pipeline",
]

PASSES: dict[str, type[Pass]] = {
    step.name: step
    for step in (
        AddPast,
        BindChoices,
        BindMemory,
        BindShapes,
        CacheInPlace,
        CanonicalizeCache,
        ConvertOpset,
        ConvertPrecision,
        DenseExperts,
        EliminateCommonSubexpressions,
        FoldConstants,
        FoldDefaults,
        FoldShapes,
        FuseAttention,
        FuseEncoderIo,
        FuseGelu,
        FuseKvIo,
        FuseLayerNorm,
        FuseRmsNorm,
        FuseRotary,
        FuseSwish,
        GroupQueryAttention,
        GrowStaticCache,
        InlineFunctions,
        LastTokenLogits,
        MatmulNbits,
        MergeSlices,
        NameDims,
        OneHotChoices,
        Onnxsim,
        QuantizeActivations,
        QuantizeKv,
        QuantizeWeights,
        RaiseContribOps,
        RemoveNoOps,
        SignWeights,
        TabulateRotary,
        TakeBranches,
        TakeChoices,
        TextPositions,
        TurnWeights,
        UncropCache,
        UnflattenGemm,
        UngroupExperts,
    )
}

PIPELINES: dict[str, str] = {
    # From an export to one spelling of everything that is not a block.
    "canonicalize": ",".join(
        (
            "inline-functions",  # first: nothing looks into function bodies
            "fold-defaults",  # before anything asks what is constant
            "take-branches",  # no pattern looks into subgraphs, either
            "convert-opset",  # before any pattern: each op has one spelling from here on
            "raise-contrib-ops",  # after the opset: it writes operators of 23 and 24
            "name-dims",  # before folding: shapes of different inputs become comparable
            "fold-constants",
            "sign-weights",
            "remove-no-ops",
            # Equal shape arithmetic has been folded by now, and no-ops told nothing else apart.
            "eliminate-common-subexpressions",
            "grow-static-cache",
            "uncrop-cache",
            # Last: shapes are numbers and names by now, and movement is what it seems.
            "canonicalize-cache",
        )
    ),
    # From there to the canonical level.
    "fuse": ",".join(
        (
            "fuse-layer-norm",  # before RMS norms: what is behind its centring looks like one
            "fuse-rms-norm",
            "fuse-swish",
            "fuse-gelu",
            "fuse-rotary",  # before attention: its result is where the heads' split is found again
            "fuse-attention",
            "remove-no-ops",  # the splits and joins of heads cancel between the fused ops
            "unflatten-gemm",  # nothing but the heads' movement is left around a product by now
            "remove-no-ops",
            "fold-shapes",  # what is left of shape arithmetic
            "merge-slices",
            "eliminate-common-subexpressions",
            "ungroup-experts",  # from here on: what works row by row is plain to see by now
            "dense-experts",
            "take-choices",  # before the scatter that says what was chosen is written out
            "one-hot-choices",
        )
    ),
    # From an export to the canonical level; of its interface only the cache's layout may change.
    "raise": "canonicalize,fuse",
}


def _as_pass(name: str, made: object) -> type[Pass]:
    if not (inspect.isclass(made) and issubclass(made, Pass)):
        raise TypeError(f"{made!r} is no subclass of omforge.passes.Pass")
    own: object = getattr(made, "name", None)
    if not (isinstance(own, str) and own):
        raise TypeError(f"{made.__name__} has no name")
    if name and own != name:
        raise ValueError(f"the name of {made.__name__} is {own!r}, not {name!r}")
    if PASSES.get(own, made) is not made:
        raise ValueError(f"{made.__name__} is called {own!r}, as a pass of the package omforge is")
    require_options(made)
    return made


def _as_pipeline(name: str, made: object) -> str:
    if not isinstance(made, str):
        raise TypeError(f"it is {made!r}, and a pipeline is text")
    return made


ALL_PASSES: Registry[type[Pass]] = Registry(
    PASSES, "omforge.passes", _as_pass, {"omforge.pipelines": PIPELINES}
)
"""The passes of plugins, too."""

ALL_PIPELINES: Registry[str] = Registry(
    PIPELINES, "omforge.pipelines", _as_pipeline, {"omforge.passes": PASSES}, by_place=False
)
"""The pipelines of plugins, too."""


def make_pipeline(text: str) -> Pipeline:
    """Return the pipeline that `text` names or spells out.

    A pass that is not installed is `package.module:Class`.

    Raises:
        InputError: The text names an unknown pass or option, or an option has a wrong value.
    """
    try:
        return parse_pipeline(text, PASSES, PIPELINES)
    except InputError:  # plugins are looked up where ours do not do: that takes its time
        return parse_pipeline(text, ALL_PASSES, ALL_PIPELINES)
