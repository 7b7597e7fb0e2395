"""Print the text that an exported model itself generates greedily, to compare a bundle's with.

The export runs on ONNX Runtime as its exporter wrote it; the bundle tells what its inputs are for.

    python examples/greedy_from_export.py BUNDLE --prompt TEXT [--max-new-tokens N]
"""

import argparse

from omforge.runtime.bundle import Bundle
from omforge.runtime.export import ExportModel
from omforge.runtime.sampling import greedy


def main() -> None:
    parser = argparse.ArgumentParser(description="Greedy text of the model a bundle was made from.")
    parser.add_argument("bundle")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    given = parser.parse_args()

    bundle = Bundle.open(given.bundle)
    manifest, tokenizer = bundle.manifest, bundle.tokenizer()
    prompt = tokenizer.encode(given.prompt)
    room = manifest.context - len(prompt)
    new: list[int] = []
    with ExportModel(bundle.export, manifest.export, manifest.kv) as model:
        token = int(greedy(model.prefill([prompt]))[0])
        while token not in manifest.model.eos_token_ids:
            new.append(token)
            if len(new) == min(given.max_new_tokens, room + 1):
                break
            token = int(greedy(model.decode([token]))[0])
    before, after = (
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (prompt, prompt + new)
    )
    print(after[len(before) :])


if __name__ == "__main__":
    main()
