"""The Cython layer: it converts arguments, releases the GIL and maps errors, and nothing else."""
