"""Compile an exported model for an NPU, and generate text from the bundle on the CPU."""

import tempfile
from pathlib import Path

from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.runtime.bundle import Bundle
from omforge.runtime.generate import LanguageModel
from omforge.runtime.text_stream import TextStream

MODEL = Path(__file__).parent / "models" / "docs-llama-onnx"
PROMPT = "This method raises ValueError if"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = compile_bundle(
            MODEL,
            Path(folder) / "bundle",
            CompileOptions(soc="Ascend310P3", context=256, prefill=(32,)),
        )
        print("nodes:", ", ".join(f"{name} {count}" for name, count in made.nodes.items()))
        print("coverage complete:", made.coverage.complete)
        for bucket in made.manifest.buckets:
            print("to compile on a machine with CANN:", *bucket.command[:3], "...")

        # The lowered graphs, with each NPU op's reference body, on ONNX Runtime.
        bundle = Bundle.open(made.folder)
        tokenizer = bundle.tokenizer()
        prompt = tokenizer.encode(PROMPT)
        text = TextStream(tokenizer, prompt)
        print(PROMPT, end="")
        with LanguageModel(bundle, "lowered") as model:
            for token in model.generate(prompt, max_new_tokens=24):
                print(text.push(token), end="", flush=True)
        print(text.finish())


if __name__ == "__main__":
    main()
