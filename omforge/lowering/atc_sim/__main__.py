"""`python -m omforge.lowering.atc_sim` is `omforge-atc-sim`."""

from omforge.lowering.atc_sim.main import main

main()
