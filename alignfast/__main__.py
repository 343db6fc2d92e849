"""`python -m alignfast`, which launchers such as torchrun want."""

import sys

from alignfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
