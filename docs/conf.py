"""The site: Sphinx and MyST-NB over the executed notebooks, offline. ``make docs`` builds it into docs/_build/html."""

import sys
from html import escape
from pathlib import Path

from docutils import nodes
from latex2mathml import converter

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from made import course, pages  # noqa: E402 - after sys.path

from fluxedu import play  # noqa: E402

project = "fluxedu"
author = "The fluxedu contributors"
DESCRIPTION = "FLUX.1 as readable code: see, change and retrain every part of it, on a laptop or in the browser."
copyright = "The fluxedu contributors, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "_made", "images/*.py", "made.py"]
nb_execution_mode = "off"  # the notebooks are stored with their outputs
nb_render_markdown_format = "myst"
nb_merge_streams = True
suppress_warnings = ["mystnb.unknown_mime_type", "myst.xref_missing", "myst.header"]
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": False}
html_math_renderer = "mathml"
html_theme = "furo"
html_title = "fluxedu"
html_favicon = "_static/favicon.svg"
templates_path = ["_templates"]
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "play.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
html_static_path = ["_static"]
html_css_files = ["site.css", "explorers.css"]
html_js_files = [("explorers.js", {"defer": "defer"})]  # makes the notebooks' explorers live, with the files of play/
html_theme_options = {"source_repository": "", "top_of_page_buttons": []}

# Sphinx reads only what is in this folder, so the notebooks are copied into it.
course(HERE.parent / "notebooks", HERE / "notebooks")
pages(HERE / "_made")


def setup(app):
    """Formulas become MathML, which browsers show without a script from the network."""

    def formula(display):
        def visit(translator, node):
            tag = "div" if display == "block" else "span"
            mathml = converter.convert(node.astext(), display=display)
            translator.body.append(f'<{tag} class="math">{mathml}</{tag}>')
            raise nodes.SkipNode

        return visit, None

    app.add_html_math_renderer("mathml", formula("inline"), formula("block"))
    app.connect("build-finished", copy_page)
    app.connect("html-page-context", describe)


def describe(app, page, template, context, doctree):
    """The description that search engines and messengers show of a page: its first paragraph."""
    paragraphs = [] if doctree is None else [p.astext() for p in doctree.findall(nodes.paragraph)]
    first = next((" ".join(text.split()) for text in paragraphs if len(text) > 60), DESCRIPTION)
    short = first if len(first) <= 160 else first[:160].rpartition(" ")[0] + " ..."
    tag = f'<meta name="description" content="{escape(short, quote=True)}">'
    context["metatags"] = context.get("metatags", "") + tag


def copy_page(app, error):
    """The page that runs the miniature becomes the site's folder ``play/``."""
    if error is None and app.builder.format == "html":
        play.copy_to(Path(app.outdir) / "play")
