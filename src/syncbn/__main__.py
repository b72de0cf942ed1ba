"""`python -m syncbn` is `syncbn`."""

import sys

from syncbn.cli import main

sys.exit(main())
