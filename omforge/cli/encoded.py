"""What `omforge run` gives of a model that encodes: vectors and scores, as text, JSON or a file."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from omforge.cli.console import show, show_json
from omforge.ir.errors import InputError
from omforge.ir.weights import replacing
from omforge.runtime.backends import BackendName, open_encoder
from omforge.runtime.bundle import Bundle
from omforge.runtime.encode import Encoded
from omforge.runtime.fixed import read_fixed
from omforge.runtime.generate import Level
from omforge.runtime.text_stream import Tokenizer, text_inputs

if TYPE_CHECKING:
    from omforge.runtime.acl_session import AclOptions

Array = npt.NDArray[Any]

_FIRST = 4
"""Numbers of a vector that are shown."""


@dataclass(frozen=True)
class EncodedText:
    """A text that was encoded, and what came out.

    Attributes:
        prompt: The text.
        pair: The second text, "" for none.
        tokens: Their ids, special ones included.
        level: Where it ran.
        seconds: What the run took.
        outputs: By name.
        labels: What the numbers of a vector of scores mean.
    """

    prompt: str
    pair: str
    tokens: tuple[int, ...]
    level: str
    seconds: float
    outputs: Encoded
    labels: tuple[str, ...] = ()

    def scores(self) -> dict[str, float]:
        """The probability of each label, or of one score its sigmoid; {} where there are none."""
        for name, array in self.outputs.items():
            if array.ndim != 1 or "logits" not in name:
                continue
            logits = array.astype(np.float64)
            if array.size == 1:
                return {"score": float(1 / (1 + np.exp(-logits[0])))}
            shares = np.exp(logits - logits.max())
            names = self.labels if len(self.labels) == array.size else ()
            shown = names or tuple(f"LABEL_{number}" for number in range(array.size))
            return dict(zip(shown, (shares / shares.sum()).tolist(), strict=True))
        return {}

    def lines(self) -> list[str]:
        """The same for people: a line for each output, one for the scores, one for the run."""
        found = [f"{name}  {_described(array)}" for name, array in self.outputs.items()]
        ranked = sorted(self.scores().items(), key=lambda item: -item[1])
        if ranked:
            found.append("scores  " + ", ".join(f"{name} {share:.3f}" for name, share in ranked))
        took = f"{len(self.tokens)} tokens in {self.seconds:.2f} s"
        return [*found, f"[{self.level}: {took}]"]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, every number of every output included."""
        return {
            "prompt": self.prompt,
            "pair": self.pair,
            "tokens": list(self.tokens),
            "level": self.level,
            "seconds": self.seconds,
            "outputs": {
                name: {
                    "dtype": array.dtype.name,
                    "shape": list(array.shape),
                    "values": array.tolist(),
                }
                for name, array in self.outputs.items()
            },
            "scores": self.scores(),
        }


def _described(array: Array) -> str:
    """Dtype, shape, length and first numbers."""
    shape = ", ".join(map(str, array.shape))
    first = " ".join(f"{number:.4g}" for number in array.ravel()[:_FIRST].tolist())
    more = " ..." if array.size > _FIRST else ""
    norm = float(np.linalg.norm(array.astype(np.float64)))
    return f"{array.dtype.name}[{shape}]  norm {norm:.4g}  {first}{more}"


def asks_to_encode(
    bundle: Bundle, pair: str, save: Path | None, generating: Sequence[str] = ()
) -> bool:
    """Whether `run` encodes, which the bundle decides.

    Args:
        bundle: The bundle.
        pair: The second text.
        save: The file to write.
        generating: The options given that are for generating alone, such as `--chat`.

    Raises:
        InputError: An option is for the other kind of bundles.
    """
    for given, option in ((pair, "--pair"), (save, "--save")):
        if given:
            bundle.require("encode", f"Leave {option} away")
    for option in generating:
        bundle.require("generate", f"Leave {option} away")
    if bundle.manifest.embeddings is not None:
        raise InputError(
            f"no text can go into the bundle {bundle.folder}",
            "the model is fed by embeddings in place of token ids, and its export has no table",
            "Use Python: LanguageModel(bundle.with_embeddings(table)), or prompts of embeddings",
        )
    return bundle.manifest.task == "encode"


def _save(outputs: Encoded, file: Path) -> None:
    """Write a .npz whole or not at all; a device is written to."""
    packed = io.BytesIO()  # a device cannot be sought in
    np.savez(packed, allow_pickle=False, **outputs)
    try:
        if file.exists() and not file.is_file():
            file.write_bytes(packed.getvalue())
            return
        with replacing(file.resolve()) as made:  # a link stays one
            made.write_bytes(packed.getvalue())
    except OSError as error:
        raise InputError(
            f"cannot write {file}", error.strerror or str(error), "Choose another --save"
        ) from error


def run_encoder(
    bundle: Bundle,
    tokenizer: Tokenizer,
    prompt: str,
    pair: str,
    place: tuple[Level, BackendName, AclOptions | None],
    save: Path | None,
    give: Path | None,
    *,
    as_json: bool,
) -> None:
    """Encode one text, and show what came out.

    `place` is the level, the backend, and how a device is used.

    Raises:
        InputError: The text does not fit, or the file cannot be written.
    """
    further = [spec.name for spec in bundle.manifest.token_inputs]
    tokens, numbers = text_inputs(tokenizer, prompt, pair, further)
    given = read_fixed(bundle.manifest.fixed, give)
    rows = bundle.batches[0]
    level, backend, options = place
    with open_encoder(
        bundle, level, batch=rows, backend=backend, fixed=given, options=options
    ) as model:
        started = time.perf_counter()
        (outputs,) = model.encode([tokens], token_inputs={n: [row] for n, row in numbers.items()})
        seconds = time.perf_counter() - started
    labels = bundle.manifest.model.labels
    where = level if backend == "cpu" else backend
    told = EncodedText(prompt, pair, tuple(tokens), where, seconds, outputs, labels)
    if save is not None:
        _save(outputs, save)
    if as_json:
        show_json(told.to_dict())
    else:
        show("\n".join(told.lines()))
