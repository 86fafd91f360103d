"""`python -m redit_fast` is the command `redit-fast`."""

import sys

from redit_fast.cli import main

sys.exit(main())
