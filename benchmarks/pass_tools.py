"""The tools that `passes.py` measures; it runs this file in a process of its own for each.

`pass_tools.py TOOL MODEL OUT` runs one tool on a model, writes what it made to `OUT/model.onnx`,
and keeps `OUT/report.json` up to date, so that after a kill it is known how far the tool came.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPORT = "report.json"
GRAPH = "model.onnx"
DATA = "model.onnx.data"

# Operators that stand for one block, in whichever domain a tool puts them.
ATTENTION = {
    "Attention",
    "DecoderMaskedMultiHeadAttention",
    "GroupQueryAttention",
    "MultiHeadAttention",
    "SparseAttention",
}
NORMS = {
    "EmbedLayerNormalization",
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
}
ROTARY = {"GemmaRotaryEmbedding", "RotaryEmbedding"}
ACTIVATIONS = {"BiasGelu", "FastGelu", "Gelu", "QuickGelu", "Silu", "Swish"}


class Report:
    """What a tool tells of itself, on disk at every moment."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.facts: dict[str, Any] = {"phases": {}, "at": "start"}

    def write(self) -> None:
        """Replace the file by what is known now."""
        self._path.write_text(json.dumps(self.facts))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the work."""
        self.facts["at"] = name
        self.write()
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.facts["phases"][name] = {
            "cpu": time.process_time() - cpu,
            "wall": time.perf_counter() - wall,
        }

    def version(self, distribution: str) -> None:
        """Note which release runs."""
        self.facts["version"] = importlib.metadata.version(distribution)


# --- omforge ------------------------------------------------------------------------------------


def omforge(model: Path, out: Path, report: Report, options: argparse.Namespace) -> None:
    """Raise; write the graph only, and link the weight file that no pass changed."""
    _omforge(model, out, report, options, watched=False)


def omforge_verify(model: Path, out: Path, report: Report, options: argparse.Namespace) -> None:
    """The same, verified after each pass, which is the pipeline's default."""
    _omforge(model, out, report, options, watched=True)


def omforge_copy(model: Path, out: Path, report: Report, options: argparse.Namespace) -> None:
    """Raise, and write all weights again as the other tools do."""
    _omforge(model, out, report, options, watched=False, copy=True)


def _omforge(
    path: Path,
    out: Path,
    report: Report,
    options: argparse.Namespace,
    *,
    watched: bool,
    copy: bool = False,
) -> None:
    with report.phase("import"):
        from omforge import ir
        from omforge.passes import make_pipeline

        report.version("omforge")
    with report.phase("load"):
        model = ir.load(path)
    if options.keep_layers:
        with report.phase("cut"):
            _keep_layers(model, options.keep_layers)
        report.facts["nodes_before"] = len(model.graph)
    pipeline = make_pipeline("raise")
    with report.phase("passes"), _profiled(report, options.profile):
        result = pipeline.run(model, None if watched else ())
    report.facts["passes"] = [
        {
            "name": run.name,
            "seconds": run.seconds,
            "rewrites": run.rewrites,
            "nodes": run.nodes_after - run.nodes_before,
        }
        for run in result.passes
    ]
    with report.phase("save"):
        if copy:
            ir.save(model, out / GRAPH, external=DATA)
        else:
            _save_linked(model, out)


def _save_linked(model: Any, out: Path) -> None:
    """Write the graph; its external tensors keep naming the export's file, which is linked here.

    A hard link, because ONNX Runtime refuses symbolic ones that leave the folder.
    """
    from omforge import ir

    (out / GRAPH).write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    places = {
        os.fspath(tensor.location): tensor.path
        for _, tensor in ir.all_tensors(model)
        if isinstance(tensor, ir.ExternalTensor)
    }
    for location, source in places.items():
        (out / location).parent.mkdir(parents=True, exist_ok=True)
        if os.stat(source).st_dev != os.stat(out).st_dev:
            raise OSError("--scratch must be on the file system of the export, to link its weights")
        os.link(source, out / location)


@contextlib.contextmanager
def _profiled(report: Report, rows: int) -> Iterator[None]:
    if not rows:
        yield
        return
    import cProfile
    import io
    import pstats

    with cProfile.Profile() as profile:
        yield
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(rows)
    report.facts["profile"] = text.getvalue()


_LAYER = re.compile(r"(?:^|[./])(?:layers?|h|blocks?)[./](\d+)(?=[./]|$)")


def _keep_layers(model: Any, keep: int) -> None:
    """Cut an export down to its first layers, told apart by the exporter's module paths.

    The last layer's output is read by the final norm; the output of layer `keep - 1` takes its
    place there. Caches of the layers that go, go too.
    """
    from omforge import ir

    graph = model.graph
    layer_of: dict[Any, int] = {}
    for node in graph:
        found = _LAYER.search(ir.layer_path(node) or node.name or "")
        if found:
            layer_of[node] = int(found[1])
    layers = max(layer_of.values(), default=-1) + 1
    if not 1 <= keep <= layers:
        raise ValueError(f"the node names tell {layers} layers apart, so {keep} cannot be kept")
    if keep == layers:
        return

    def handed_on(layer: int, to: int | None) -> Any:
        values = [
            value
            for node in graph
            if layer_of.get(node) == layer
            for value in node.outputs
            if any(layer_of.get(user) == to for user, _ in value.uses())
        ]
        return values[-1]

    kept, last = handed_on(keep - 1, keep), handed_on(layers - 1, None)
    for user, index in list(last.uses()):
        if user not in layer_of:
            user.replace_input_with(index, kept)
    gone = [v for v in graph.outputs if layer_of.get(v.producer(), -1) >= keep]
    for value in gone:
        graph.outputs.remove(value)
    ir.common_passes.RemoveUnusedNodesPass()(model)
    for value in [v for v in graph.inputs if not v.uses()]:
        graph.inputs.remove(value)


# --- peers --------------------------------------------------------------------------------------


def onnx_ir(model: Path, out: Path, report: Report, options: argparse.Namespace) -> None:
    """Five passes that read no weight; saving copies every one."""
    with report.phase("import"):
        import onnx_ir as ir
        from onnx_ir.passes import common

        report.version("onnx-ir")
    with report.phase("load"):
        loaded = ir.load(model)
    with report.phase("passes"):
        ir.passes.Sequential(
            common.LiftConstantsToInitializersPass(),
            common.IdentityEliminationPass(),
            common.CommonSubexpressionEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.TopologicalSortPass(),
        )(loaded)
    with report.phase("save"):
        ir.save(loaded, out / GRAPH, external_data=DATA)


def onnxscript(model: Path, out: Path, report: Report, options: argparse.Namespace) -> None:
    """`optimizer.optimize`, then `ort_fusions.optimize_for_ort`."""
    with report.phase("import"):
        import onnx_ir as ir
        from onnxscript import optimizer
        from onnxscript.rewriter import ort_fusions

        report.version("onnxscript")
    with report.phase("load"):
        loaded = ir.load(model)
    with report.phase("passes"):
        optimizer.optimize(loaded)
        loaded, _ = ort_fusions.optimize_for_ort(loaded)
    with report.phase("save"):
        ir.save(loaded, out / GRAPH, external_data=DATA)


def onnxsim(model: Path, out: Path, report: Report, options: argparse.Namespace) -> None:
    """From path to path, its leanest way; at opset 23, where it finds the most."""
    with report.phase("import"):
        import onnxsim

        report.version("onnxsim")
    with report.phase("load, passes and save"):
        onnxsim.simplify(str(model), target_opset_version=23, output_path=str(out / GRAPH))


def onnxslim(model: Path, out: Path, report: Report, options: argparse.Namespace) -> None:
    """Its defaults; weights in a file of their own, or 2 GB is the end."""
    with report.phase("import"):
        import onnxslim

        report.version("onnxslim")
    with report.phase("load, passes and save"):
        onnxslim.slim(str(model), str(out / GRAPH), save_as_external_data=True)


def ort(model: Path, out: Path, report: Report, options: argparse.Namespace) -> None:
    """`onnxruntime.transformers.optimizer`, its fusions only: opt_level 1 imports torch."""
    with report.phase("import"):
        from onnxruntime.transformers import optimizer

        report.version("onnxruntime")
    config = read_config(model.parent)
    # gpt2 is what its own Llama script uses; a family has a type of its own or that one.
    kind = config.get("model_type")
    with report.phase("load and passes"):
        optimized = optimizer.optimize_model(
            str(model),
            model_type=kind if kind in optimizer.MODEL_TYPES else "gpt2",
            num_heads=config.get("num_attention_heads", config.get("n_head", 0)),
            hidden_size=config.get("hidden_size", config.get("n_embd", 0)),
            opt_level=0,
        )
    with report.phase("save"):
        optimized.save_model_to_file(str(out / GRAPH), use_external_data_format=True)


# --- counting -----------------------------------------------------------------------------------


def count(path: Path) -> dict[str, int]:
    """Count nodes, subgraphs included, and the operators that stand for blocks."""
    import onnx

    graphs = [onnx.load(path, load_external_data=False).graph]
    for graph in graphs:  # it grows while it is walked
        graphs += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    nodes = [node for graph in graphs for node in graph.node]
    ops = Counter(node.op_type for node in nodes)
    activated = {n.output[0]: n.input[0] for n in nodes if n.op_type in ACTIVATIONS}
    return {
        "nodes": len(nodes),
        "attention": sum(ops[op] for op in ATTENTION),
        "norms": sum(ops[op] for op in NORMS),
        # GroupQueryAttention can rotate Q and K itself.
        "rotary": sum(ops[op] for op in ROTARY) + 2 * sum(map(_rotates, nodes)),
        "mlp": sum(1 for node in nodes if _gates(node, activated)),
    }


def _rotates(node: Any) -> bool:
    return any(a.name == "do_rotary" and a.i for a in node.attribute)


def _gates(node: Any, activated: dict[str, str]) -> bool:
    """Mul of an activation and something that is not what was activated."""
    if node.op_type != "Mul":
        return False
    left, right = node.input
    return any(a in activated and activated[a] != b for a, b in ((left, right), (right, left)))


def read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return json.loads(file.read_text()) if file.is_file() else {}


Tool = Callable[[Path, Path, Report, argparse.Namespace], None]

TOOLS: dict[str, Tool] = {
    "omforge": omforge,
    "omforge-verify": omforge_verify,
    "omforge-copy": omforge_copy,
    "onnx-ir": onnx_ir,
    "onnxscript": onnxscript,
    "onnxsim": onnxsim,
    "ort": ort,
    "onnxslim": onnxslim,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=[*TOOLS, "count"])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--keep-layers", type=int, default=0)
    parser.add_argument("--profile", type=int, default=0)
    options = parser.parse_args()
    report = Report(options.out / REPORT)
    if options.tool == "count":
        report.facts = {"counts": count(options.model)}
        report.write()
        return
    try:
        TOOLS[options.tool](options.model, options.out, report, options)
    except ModuleNotFoundError as error:
        report.facts["missing"] = str(error)
    except Exception as error:  # a tool that fails is a row of the table
        report.facts["error"] = f"{type(error).__name__}: {error}"
    report.write()


if __name__ == "__main__":
    main()
