"""How the documentation is built: ``python -m sphinx -W -n -b html docs docs/_build/html``."""

import inspect
import os
import re
import time
import warnings
from contextlib import suppress
from threading import Thread
from urllib.request import Request, urlopen

import numpydoc.xref
import torch

import fisherops

project = "fisherops"
author = "The fisherops developers"
copyright = author
release = version = fisherops.__version__
REPOSITORY = "https://github.com/fisherops/fisherops"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "numpydoc",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
]
# The scripts of the tutorials become pages in gallery/, so tutorials/ itself has no pages.
exclude_patterns = ["_build", "_static", "tutorials"]
templates_path = ["_templates"]
default_role = "autolink"
# A copy of MathJax 3.2.2, so that formulas need no network.
mathjax_path = "mathjax/tex-svg.js"

# ---- Pages in Markdown ---------------------------------------------------------------------------

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# ---- Docstrings ----------------------------------------------------------------------------------

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autosummary_generate = True
toc_object_entries_show_parents = "hide"


def members(cls: type) -> dict[str, list[str]]:
    """Return the public methods and properties of a class, which its page lists first.

    Fields of results are in the docstrings' own tables, so they are left out.
    """
    values = {
        name: inspect.getattr_static(cls, name)
        for name in dir(cls)
        if not name.startswith("_")
    }
    return {
        "methods": [
            n
            for n, v in values.items()
            if inspect.isroutine(v) and n not in ("count", "index")
        ],
        "properties": [
            n for n, v in values.items() if isinstance(v, property)
        ],
    }


autosummary_context = {
    "class_members": {
        f"{module.__name__}.{name}": members(getattr(module, name))
        for module in (
            fisherops,
            fisherops.approximate,
            fisherops.linalg,
            fisherops.likelihoods,
            fisherops.score_matrix,
            fisherops.scores,
        )
        for name in dir(module)
        if isinstance(getattr(module, name), type)
    }
}
numpydoc_show_class_members = False
numpydoc_xref_param_type = True
numpydoc_xref_ignore = "all"
numpydoc_xref_aliases = {
    "LinearOperator": "scipy.sparse.linalg.LinearOperator",
    "Tensor": "torch.Tensor",
    "FisherOperator": "fisherops.FisherOperator",
    "Likelihood": "fisherops.likelihoods.Likelihood",
    "Plan": "fisherops.scores.Plan",
    "Projection": "fisherops.scores.Projection",
    "ScoreMatrix": "fisherops.score_matrix.ScoreMatrix",
    "StoredScores": "fisherops.stored.StoredScores",
} | {
    name: f"fisherops.linalg.{name}"
    for name in (
        "Bounds",
        "Density",
        "Eigenpairs",
        "Estimate",
        "Inverse",
        "Solution",
    )
}

numpydoc_xref_aliases |= {
    name: f"fisherops.approximate.{name}"
    for name in ("Comparison", "Error", "StructuredOperator")
}

# Types such as "int" are left as words.
numpydoc.xref.DEFAULT_LINKS.clear()


def process_signature(
    app, what, name, obj, options, signature, return_annotation
):
    """Give classes the signature of their __init__ (SciPy's operators have a __new__), without private arguments."""
    if what != "class" or obj.__init__ is object.__init__:
        return signature, return_annotation
    if getattr(obj, "_is_protocol", False):
        return "", return_annotation
    own = inspect.signature(obj.__init__)
    shown = [
        p.replace(annotation=p.empty)
        for p in own.parameters.values()
        if p.name != "self" and not p.name.startswith("_")
    ]
    if any(
        "dataclass" in str(p.default) or "factory" in str(p.default)
        for p in shown
    ):
        return signature, return_annotation
    return str(
        own.replace(parameters=shown, return_annotation=own.empty)
    ), return_annotation


def process_docstring(app, what, name, obj, options, lines):
    """Escape the initials of authors, which docutils would read as the numbers of a list."""
    lines[:] = [
        re.sub(r"^(\s*)(?=[A-Z]\. )", r"\1\\", line) for line in lines
    ]


def setup(app):
    """Connect the two functions above."""
    app.connect("autodoc-process-signature", process_signature)
    app.connect(
        "autodoc-process-docstring", process_docstring, priority=900
    )


# ---- Other projects ------------------------------------------------------------------------------

INVENTORIES = {
    "python": "https://docs.python.org/3/",
    "numpy": "https://numpy.org/doc/stable/",
    "scipy": "https://docs.scipy.org/doc/scipy/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "cupy": "https://docs.cupy.dev/en/stable/",
    "matplotlib": "https://matplotlib.org/stable/",
}


def reachable(
    inventories: dict[str, str], seconds: float
) -> dict[str, tuple[str, None]]:
    """Return the projects whose list of names answers within some seconds."""
    found: dict[str, tuple[str, None]] = {}

    def look(name: str, url: str) -> None:
        with (
            suppress(OSError),
            urlopen(
                Request(url + "objects.inv", method="HEAD"),
                timeout=seconds,
            ),
        ):
            found[name] = (url, None)

    threads = [
        Thread(target=look, args=item, daemon=True)
        for item in inventories.items()
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(sorted(found.items()))


# Without a network, or with FISHEROPS_DOCS_OFFLINE set, names of other projects are printed without links.
intersphinx_mapping = (
    {}
    if os.environ.get("FISHEROPS_DOCS_OFFLINE")
    else reachable(INVENTORIES, seconds=5)
)
intersphinx_timeout = 10
nitpick_ignore = [
    ("py:obj", "logabsdet"),  # a field of a named tuple
    ("py:obj", "scores"),  # named in summaries, outside of its class
]
nitpick_ignore_regex = [
    (r"py:.*", r"(numpy|scipy|torch|cupy|cupyx|matplotlib)\..*"),
]

# ---- Tutorials -----------------------------------------------------------------------------------

sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/plot_",
    "within_subsection_order": "FileNameSortKey",
    "show_signature": False,
    "abort_on_example_error": True,
    "only_warn_on_example_error": False,
    "image_srcset": ["2x"],
    "matplotlib_animations": False,
    "remove_config_comments": True,
    "show_memory": False,
    "download_all_examples": False,
    "reset_modules": ("matplotlib",),
    "doc_module": ("fisherops",),
    "reference_url": {"fisherops": None},
}
# The problems are small, so threads would only wait for each other.
torch.set_num_threads(1)
# Tutorials must not warn, apart from what matplotlib says when a picture is not shown in a window.
warnings.filterwarnings(
    "ignore", message=".*non-interactive.*", category=UserWarning
)

# ---- HTML ----------------------------------------------------------------------------------------

html_theme = "pydata_sphinx_theme"
html_title = f"fisherops {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
# Pages without a section have no navigation to show.
html_sidebars = {"faq": [], "glossary": [], "changelog": []}
html_context = {"repository": REPOSITORY}
copybutton_exclude = ".linenos, .gp, .go"
html_theme_options = {
    "logo": {"text": "fisherops"},
    "icon_links": [
        {
            "name": "Repository",
            "url": REPOSITORY,
            "icon": "fa-brands fa-github",
        }
    ],
    "header_links_before_dropdown": 5,
    "navigation_with_keys": False,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": ["project-links"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
