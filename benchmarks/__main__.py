"""``python -m benchmarks --out bench.json`` is ``fluxedu bench --out bench.json``."""

import sys

from fluxedu.cli import app

if __name__ == "__main__":
    app(["bench", *sys.argv[1:]], prog_name="python -m benchmarks")
