"""``python -m equimd``."""

from equimd.cli import main

main()
