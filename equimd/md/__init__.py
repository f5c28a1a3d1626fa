"""Molecular dynamics with any ASE calculator: seeded, checkpointed, resumable to the last bit.

``settings`` says what is run, ``integrators`` and ``constraints`` hold ASE's dynamics, ``dynamics`` the atoms in
motion, ``averages`` the means along a run, ``checkpoint`` what a resume needs, ``output`` the trajectory files, and
``run`` the loop.
"""

from equimd.md.dynamics import CalculatorError, UnstableStart
from equimd.md.run import MDResult, iterate_md, run_md
from equimd.md.settings import MDSettings

__all__ = ["CalculatorError", "MDResult", "MDSettings", "UnstableStart", "iterate_md", "run_md"]
