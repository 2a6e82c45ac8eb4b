"""`python -m benchmarks.serving`, the same as `quire bench serving`."""

import sys

from benchmarks.serving import main

if __name__ == "__main__":
    sys.exit(main())
