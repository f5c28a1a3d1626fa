"""Networks that turn a graph into energies, and the wrappers around them."""
