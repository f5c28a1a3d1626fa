"""What ``benchmarks/gpu.py`` measures, a module for each part or two, and the processes it measures in."""
