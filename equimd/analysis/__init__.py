"""Numbers about any force field, as frozen results; sees ASE calculators and ForceFields only, never a network."""
