"""Models of tests are so small that a second thread costs more than it gives; torch reads this when it is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
