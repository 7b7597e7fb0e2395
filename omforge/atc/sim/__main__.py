"""`python -m omforge.atc.sim` is `omforge-atc-sim`."""

from omforge.atc.sim.main import main

main()
