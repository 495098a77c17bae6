"""`python tests/tools MODE ...`: what `python cspine.py MODE ...` starts for these
modes."""

import sys

from modes import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
