"""The length of the states of an encoder that a decoder attends to: its memory."""

from __future__ import annotations

from omforge import ir
from omforge.bundle.source import Source
from omforge.passes.bind_memory import BindMemory
from omforge.recognition.attention.cross import memory_lengths
from omforge.recognition.config import ModelConfig
from omforge.recognition.interface import find_interface, memory_of
from omforge.rewriting.base import Pass

_ENCODERS = ("encoder_model.onnx", "encoder.onnx")


def memory_passes(
    model: ir.Model, asked: int | None, config: ModelConfig | None, source: Source
) -> tuple[Pass, ...]:
    """What gives memory its length, for a decoder that has one whose length is open.

    Args:
        model: Raised.
        asked: The length that the user says.
        config: What config.json says.
        source: Where the export is: its encoder, beside it, may state the length.

    Raises:
        InputError: Nothing says it, or what is asked contradicts the export.
    """
    interface = find_interface(model)
    memory = memory_of(interface)
    if not memory_lengths(interface):
        if asked is not None and not memory:
            raise ir.InputError(
                f"--encoder-length {asked} does not fit the model",
                "no input of it is the states of an encoder",
                "Leave it away",
            )
        return ()
    stated = (config.memory_length if config is not None else None) or _of_encoder(source)
    length = asked or stated
    if length is None:
        named = ", ".join(str(value.name) for value in memory[:4])
        raise ir.InputError(
            "the length of the encoder's states is not known",
            f"the decoder reads {named}{', …' if len(memory) > 4 else ''}, of any length, and a "
            "bucket has one",
            "Give it with --encoder-length N; shorter ones are padded under their mask, if it has "
            "one",
        )
    if stated is not None and length != stated and not _masked(memory):
        raise ir.InputError(
            f"--encoder-length {length} does not fit the model",
            f"its encoder makes {stated} states, and the decoder has no mask for them",
            f"Leave it away, or say --encoder-length {stated}",
        )
    return (BindMemory(length),)


def _masked(memory: tuple[ir.Value, ...]) -> bool:
    return any(value.dtype is not None and not value.dtype.is_floating_point() for value in memory)


def _of_encoder(source: Source) -> int | None:
    """The number of states that the encoder beside the decoder makes, where it is one number."""
    for name in _ENCODERS:
        file = source.graph.with_name(name)
        if not file.is_file() or file == source.graph:
            continue
        for output in ir.read_message(file).graph.output:
            dims = output.type.tensor_type.shape.dim
            if len(dims) == 3 and dims[1].dim_value > 0:
                return dims[1].dim_value
    return None
