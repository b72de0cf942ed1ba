"""`python -m syncbn.launch`: the supervisor that `launch()` starts; people use `syncbn launch`."""

import sys

from syncbn.launch.supervisor import main

sys.exit(main())
