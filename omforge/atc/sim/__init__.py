"""A simulated atc: its command line, its ONNX parser and its .om container, without CANN.

It exists to test what omforge makes. It reads the ONNX protobuf itself and shares no rule with
`omforge.lowering.legality`, so that each tests the other; only the raw tables in
`omforge/lowering/data` are read by both.

What it is as strict as: the command line of CANN 9.2 (hicann/ge:api/atc,
compiler/api/aclgrph/option_utils.cc) and its ONNX parser with the built-in plugins
(hicann/ge:parser/parser/onnx). What it does not do: shape inference, fusion, precision, tiling and
kernels. Success here says that atc would parse the model, not that a kernel exists.

GE graphs (--framework=1) have no parser: they go through GE's own loader, which is lenient, and
through its inference, which here is ONNX's over the bodies of `omforge.air.reference` (`air`). What
it does not do there: constant folding, and operators that have no body (SIM062); of tilings
(E20001) it knows those of fused attention on 310P.

Where the real atc goes wrong without a word (an empty tensor for a Constant with `value_ints`, an
epsilon that is ignored), the simulator refuses with a code of its own, `SIM010` to `SIM053` and, of
GE graphs, `SIM071` to `SIM085`, and says what atc would do. OMFORGE_ATC_SIM_STRICT=0 turns those
into warnings. `SIM000` and `SIM060` to `SIM064` are its own limits; `SIM070`, `SIM076` and `SIM083`
are told and harm nobody: flags that are ignored, attributes that nobody reads, the AI CPU.
OMFORGE_ATC_SIM_RELEASE=9 leaves out what only releases before CANN 9 refuse (E16005).

One name differs from the real one's: an output whose node a plugin expands is called after an inner
node there, `<node>_<suffix>:0:<tensor>`, and after the node here. The part behind the last colon is
the same, and is what readers should look at.
"""
