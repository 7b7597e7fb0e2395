"""Questions that only CANN and a device can answer: probes, their runner, and what they settle.

`record` is what a probe is, `questions` the probes, `kit` the folder that they are exported to,
`portable` the runner that a kit takes along, `run` runs one from here, `results` reads what came
of it, `bench` measures a bundle. The facts are read by `omforge.lowering.facts`.
"""
