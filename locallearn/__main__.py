"""``python -m locallearn``: see :mod:`locallearn.command_line`."""

import sys

from locallearn.command_line import main

if __name__ == "__main__":
    sys.exit(main())
