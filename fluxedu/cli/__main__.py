"""``python -m fluxedu.cli``: the same as ``fluxedu``."""

from fluxedu.cli import app

if __name__ == "__main__":
    app()
