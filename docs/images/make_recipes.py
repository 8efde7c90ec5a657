"""Draws the figures of docs/recipes.md by running the code of that page: ``python docs/images/make_recipes.py``."""

import os
import re
import shutil
from pathlib import Path

FOLDER = Path(__file__).resolve().parent

if __name__ == "__main__":
    code = re.findall(r"```python\n(.*?)```", (FOLDER.parent / "recipes.md").read_text(encoding="utf-8"), re.DOTALL)
    (FOLDER / "recipes").mkdir(exist_ok=True)
    os.chdir(FOLDER / "recipes")
    exec("\n".join(code))
    shutil.rmtree("activations")  # a recording that one recipe reads again
