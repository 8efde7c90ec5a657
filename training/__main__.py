"""``python -m training --all`` is ``fluxedu train --all``."""

import sys

from fluxedu.cli import app

if __name__ == "__main__":
    app(["train", *sys.argv[1:]], prog_name="python -m training")
