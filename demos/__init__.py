"""One demo per framework: `python -m demos list`."""

import os

# Threads that wait for each other on matrices of a few rows cost more time than they save; NumPy reads this once.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
