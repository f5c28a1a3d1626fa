"""Molecular dynamics with any ASE calculator: seeded, checkpointed, resumable to the last bit.

``settings`` says what is run, ``integrators`` holds ASE's dynamics, ``output`` the trajectory files, ``run`` the loop.
"""

from equimd.md.run import MDResult, iterate_md, run_md
from equimd.md.settings import MDSettings

__all__ = ["MDResult", "MDSettings", "iterate_md", "run_md"]
