"""`python tests/tools MODE ...`: what `python cspine.py MODE ...` starts for these
modes."""

import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[2]))  # where cspine.py lies

from modes import main  # noqa: E402

if __name__ == "__main__":
    with suppress(AttributeError):  # a name that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main(sys.argv[1:]))
