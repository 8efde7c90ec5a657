"""One run as one page: every stage of the diagram, and behind each what was recorded there.

    fluxedu trace "a red circle left of a blue square" --html out.html

The page needs nothing but a browser: pictures and script are inside, nothing is fetched.
"""

from fluxedu.trace.page import page
from fluxedu.trace.stages import Stage, stages

__all__ = ["Stage", "page", "stages"]
