"""`python -m anybit.cli` is the same as `anybit`."""

import sys

from anybit.cli import main

sys.exit(main())
