"""Compile an exported model for an NPU, and generate text from the bundle on the CPU."""

import tempfile
from pathlib import Path

import omforge as of

MODEL = Path(__file__).parent / "models" / "docs-llama-onnx"
PROMPT = "This method raises ValueError if"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        bundle = of.compile(
            MODEL,
            target="Ascend310P3",
            output=Path(folder) / "bundle",
            context=256,
            prefill=[32],
        )
        made = bundle.compiled
        assert made is not None
        print("nodes:", ", ".join(f"{name} {count}" for name, count in made.nodes.items()))
        print("coverage complete:", made.coverage.complete)
        for bucket in bundle.manifest.buckets:
            print("to compile on a machine with CANN:", *bucket.command[:3], "...")

        # The lowered graphs, with each NPU op's reference body, on ONNX Runtime.
        print(PROMPT + bundle.generate(PROMPT, max_new_tokens=24).text)


if __name__ == "__main__":
    main()
