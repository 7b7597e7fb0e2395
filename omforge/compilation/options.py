"""What the caller of a compilation chooses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from omforge.atc.build import BuildOptions
from omforge.atc.command import AtcOptions
from omforge.compilation.insertion import Insertion
from omforge.compilation.quantize_options import KvDtype
from omforge.ir.floats import FLOATS, FloatName
from omforge.ir.fronts import Front
from omforge.lowering.facts import NOTHING_SEEN, Facts

TaskOption = Literal["auto", "generate", "encode"]


@dataclass(frozen=True)
class CompileOptions:
    """What the caller chooses.

    Attributes:
        soc: Value of atc's --soc_version.
        task: What the model is for; `auto` is what its graph says.
        context: Tokens that a sequence may hold, C; if None the least of 2,048, what the model's
            configuration says and what its graph bounds it to.
        prefill: Lengths S of the prefill buckets; of a model without a cache, of all of them.
        batch: Rows B of every bucket.
        dtype: Dtype of the lowered graphs.
        layout: Of the cache; `auto` is the one that moves the fewest bytes, which is per-layer:
            atc copies a stacked cache once a step to take it apart (see `legalize.choices`).
        allow_partial: Go on although blocks were not raised.
        gears: One lowered graph whose `seq` is open, for all buckets: atc compiles it once, with
            the buckets' lengths as gears (--dynamic_dims), so that they share weights.
        front: What atc is given: ONNX graphs, or GE graphs (.air), which say what no ONNX plugin
            passes on.
        forms: Operator and form, for what `legalize` shall not choose by bytes.
        quantize: How weights are stored, as `quantize_options` reads it; "" for floats.
        kv_dtype: Of the cache; fp16 is the graphs' own dtype.
        calibration: A text, or token numbers as .npy, for what needs one.
        budget: Bytes of all constants of a lowered graph, such as 3.9GiB: some layers then get more
            bits than `quantize` says. "" for none.
        encoder_length: Of the encoder's states that a decoder attends to; None: what the export or
            its config.json says.
        insert: Passes of the caller's own among those that raise.
        atc: Flags of atc that may be chosen.
        build: Which atc is run, and how.
        facts: What was seen on the target.
    """

    soc: str
    task: TaskOption = "auto"
    context: int | None = None
    prefill: tuple[int, ...] = ()
    batch: int = 1
    dtype: FloatName = "fp16"
    layout: Literal["auto", "stacked", "per-layer"] = "auto"
    allow_partial: bool = False
    gears: bool = False
    front: Front = "onnx"
    forms: tuple[tuple[str, str], ...] = ()
    quantize: str = ""
    kv_dtype: KvDtype = "fp16"
    calibration: str | Path | None = None
    budget: str = ""
    encoder_length: int | None = None
    insert: tuple[Insertion, ...] = ()
    atc: AtcOptions = field(default_factory=AtcOptions)
    build: BuildOptions = field(default_factory=BuildOptions)
    facts: Facts = NOTHING_SEEN

    @property
    def float_name(self) -> str:
        """The dtype of the lowered graphs, as a manifest writes it."""
        return FLOATS[self.dtype]
