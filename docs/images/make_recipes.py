"""Draws the pictures of docs/recipes.md by running the page's own code: ``python docs/images/make_recipes.py``."""

import os
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    code = re.findall(r"```python\n(.*?)```", (HERE.parent / "recipes.md").read_text(encoding="utf-8"), re.DOTALL)
    (HERE / "recipes").mkdir(exist_ok=True)
    os.chdir(HERE / "recipes")
    exec("\n".join(code))
