"""`python -m syncbn.launch`: the supervisor, which `launch()` starts; people say `syncbn launch`."""

import sys

from syncbn.launch.supervisor import main

sys.exit(main())
