"""A bundle in Python: opened, asked, compared with its export, and what it takes of memory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omforge.api.planning import Planned, plan
from omforge.api.results import Result, table
from omforge.bundle.manifest import Manifest
from omforge.compilation.compile import CompileResult
from omforge.runtime import bundle as runtime
from omforge.runtime.backends import open_encoder, open_model
from omforge.runtime.compare import verify_bundle
from omforge.runtime.encode import Encoded, Encoder
from omforge.runtime.generate import LanguageModel, Level
from omforge.runtime.sampling import Sampling
from omforge.runtime.text_stream import TextStream, chat_tokens, text_inputs
from omforge.runtime.verify_report import VerifyReport

Progress = runtime.Progress


@dataclass(frozen=True)
class Generated(Result):
    """A text that was continued.

    Attributes:
        prompt: Token ids of the prompt.
        tokens: The new ones.
        text: Their text; "" where the bundle has no tokenizer.
        stopped: Why it ended.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    stopped: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return self.text or " ".join(map(str, self.tokens))


@dataclass(frozen=True)
class Verified(Result):
    """A comparison of a bundle's levels with its export.

    Attributes:
        report: All of it.
    """

    report: VerifyReport

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return self.report.ok

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return self.report.to_dict()

    def __str__(self) -> str:
        rows = [
            (c.level, c.reference, c.case, f"{c.max_abs:.1e}", f"{c.excess:.1%}")
            for c in self.report.comparisons
        ]
        lines = [table(("level", "against", "case", "max abs", "of limit"), rows)]
        lines += [f"failed: {f.what}: {f.why}. {f.next_step}" for f in self.report.failures]
        return "\n".join([*lines, "verified" if self.ok else "not verified"])


@dataclass(frozen=True)
class Bundle(Result):
    """A bundle folder, whose files are what its manifest says; make one with `Bundle.open`.

    Attributes:
        inner: What the sessions read.
        compiled: What `compile` did, where it has just been made: passes, events, coverage.
    """

    inner: runtime.Bundle
    compiled: CompileResult | None = field(default=None, repr=False)

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        *,
        check: bool = True,
        remembered: bool = True,
        progress: Progress | None = None,
    ) -> Bundle:
        """Open a bundle.

        Args:
            folder: Where it is.
            check: Compare its files with the hashes in its manifest.
            remembered: Whether a large file that did not change since its hash was taken need not
                be read again.
            progress: Told of each file that is hashed, in bytes.

        Raises:
            InputError: It is no bundle, or a file is missing or truncated.
            CheckError: A file is not the one that was written.
        """
        return cls(
            runtime.Bundle.open(
                folder, verify_hashes=check, remembered=remembered, progress=progress
            )
        )

    @classmethod
    def opened(cls, folder: Path, compiled: CompileResult) -> Bundle:
        """Return the bundle that has just been made."""
        return cls(runtime.Bundle.open(folder, verify_hashes=False), compiled)

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.inner.folder

    @property
    def manifest(self) -> Manifest:
        """What it says of itself."""
        return self.inner.manifest

    def session(
        self, level: Level = "lowered", *, backend: str = "cpu", batch: int | None = None
    ) -> LanguageModel | Encoder:
        """Open its graphs to run them step by step; close what is returned, or use `with`.

        Args:
            level: `lowered`, the buckets, or `canonical`, the graph before lowering.
            backend: `cpu`, `sim`, `acl`, or a plugin's.
            batch: B; the first that it has buckets for unless given.

        Raises:
            InputError: The backend cannot run it, or is not there.
        """
        rows = self.inner.batches[0] if batch is None else batch
        if self.manifest.task == "encode":
            return open_encoder(self.inner, level, batch=rows, backend=backend)
        return open_model(self.inner, level, batch=rows, backend=backend)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        chat: bool = False,
        level: Level = "lowered",
        backend: str = "cpu",
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Generated:
        """Continue a text, or token ids.

        Args:
            prompt: What to continue.
            max_new_tokens: Stop after so many.
            chat: Take the prompt as a message to answer.
            level: As in `session`.
            backend: As in `session`.
            temperature: 0 takes the likeliest token.
            top_k: Draw from the k likeliest; 0: all.
            top_p: Draw from the likeliest that add up to p.
            seed: The same seed draws the same tokens.

        Raises:
            InputError: The bundle encodes, or the prompt or an option does not fit it.
        """
        self.inner.require("generate", "Use encode()")
        sampling = Sampling(temperature, top_k, top_p, seed)
        stream = None
        if isinstance(prompt, str):
            tokenizer = self.inner.tokenizer()
            tokens = chat_tokens(tokenizer, prompt) if chat else tokenizer.encode(prompt)
            stream = TextStream(tokenizer, tokens)
        else:
            tokens = list(prompt)
        rows = self.inner.batches[0]
        with open_model(self.inner, level, batch=rows, backend=backend) as model:
            run = model.generate(tokens, max_new_tokens=max_new_tokens, sampling=sampling)
            text = "".join("" if stream is None else stream.push(token) for token in run)
        text += "" if stream is None else stream.finish()
        return Generated(tuple(tokens), tuple(run.tokens), text, str(run.reason))

    def encode(self, text: str, pair: str = "") -> Encoded:
        """Run a text, or a pair, through a bundle that encodes; its outputs by name, float32.

        Raises:
            InputError: The bundle generates, or the text does not fit it.
        """
        self.inner.require("encode", "Use generate()")
        further = [spec.name for spec in self.manifest.token_inputs]
        tokens, numbers = text_inputs(self.inner.tokenizer(), text, pair, further)
        given = {name: [row] for name, row in numbers.items()}
        with open_encoder(self.inner, batch=self.inner.batches[0]) as model:
            return model.encode([tokens], token_inputs=given)[0]

    def verify(
        self,
        source: str | os.PathLike[str] | None = None,
        *,
        steps: int = 8,
        progress: Progress | None = None,
    ) -> Verified:
        """Compare its levels with the export, on logits, and lowered with canonical.

        Args:
            source: The exported .onnx file; where it was when the bundle was made, if absent.
            steps: Decode steps behind each prompt.
            progress: Told of each case.

        Raises:
            InputError: `source` is missing, or not what the bundle was made from.
        """
        return Verified(verify_bundle(self.inner, source, steps=steps, progress=progress))

    def plan(self, *, memory: str = "", knobs: bool = False) -> Planned:
        """Return what it takes of a device: memory, bytes and products of a step, bounds of time.

        Args:
            memory: What the device has, such as `6GiB`.
            knobs: Whether to weigh other sizes, too.

        Raises:
            InputError: The memory is no size.
        """
        return plan(self.folder, target=self.manifest.target, memory=memory, knobs=knobs)

    def to_json(self) -> dict[str, Any]:
        """Return what it is, and what compile did, as plain data."""
        made, done = self.manifest, self.compiled
        return {
            "folder": str(self.folder),
            "task": made.task,
            "target": made.target,
            "dtype": made.dtype,
            "context": made.context,
            "batch": made.batch,
            "buckets": [bucket.name for bucket in made.buckets],
            "coverage": made.coverage,
            "events": [] if done is None else [dataclasses.asdict(event) for event in done.events],
            "passes": []
            if done is None
            else [
                {"pass": str(run.step), "rewrites": run.rewrites, "seconds": run.seconds}
                for run in done.passes
            ],
        }

    def __str__(self) -> str:
        made = self.manifest
        names = ", ".join(bucket.name for bucket in made.buckets)
        return (
            f"{self.folder}: {made.task}, {made.target}, {made.dtype}, context {made.context}, "
            f"batch {made.batch}: {names}"
        )
