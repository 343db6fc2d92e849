"""`python -m alignfast`, which launchers such as torchrun want."""

import sys

from alignfast.cli import main

sys.exit(main())
