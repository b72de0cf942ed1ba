"""The supervisor that `launch()` starts; people use `syncbn launch`."""

import sys
from pathlib import Path

# Last, so that it is there where nothing else has it and comes before nothing.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from syncbn.launch.supervisor import main

sys.exit(main())
