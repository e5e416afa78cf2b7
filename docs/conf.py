"""How the documentation is built: ``python -m sphinx -W -n -b html docs docs/_build/html``."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch

import fisherops

project = "fisherops"
author = "The fisherops developers"
copyright = author
release = version = fisherops.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "numpydoc",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
]
# The scripts of the tutorials become pages in gallery/; tutorials/ itself holds no pages.
exclude_patterns = ["_build", "tutorials"]
default_role = "autolink"

# ---- Pages in Markdown ---------------------------------------------------------------------------

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# ---- Docstrings ----------------------------------------------------------------------------------

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autosummary_generate = False
numpydoc_show_class_members = False
numpydoc_xref_param_type = True
numpydoc_xref_ignore = "all"
numpydoc_xref_aliases = {
    "LinearOperator": "scipy.sparse.linalg.LinearOperator",
    "Tensor": "torch.Tensor",
    "FisherOperator": "fisherops.FisherMCLinearOperator",
    "Likelihood": "fisherops.likelihoods.Likelihood",
    "Plan": "fisherops.scores.Plan",
    "ScoreMatrix": "fisherops.score_matrix.ScoreMatrix",
} | {
    name: f"fisherops.linalg.{name}"
    for name in ("Bounds", "DampedInverse", "Density", "Eigenpairs", "Estimate", "Solution")
}

# ---- Other projects ------------------------------------------------------------------------------

INVENTORIES = {
    "python": "https://docs.python.org/3/",
    "numpy": "https://numpy.org/doc/stable/",
    "scipy": "https://docs.scipy.org/doc/scipy/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "cupy": "https://docs.cupy.dev/en/stable/",
    "matplotlib": "https://matplotlib.org/stable/",
}


def reachable(url: str) -> bool:
    """Whether the list of names of another project can be had."""
    try:
        with urlopen(Request(url + "objects.inv", method="HEAD"), timeout=4):
            return True
    except (URLError, OSError, ValueError):
        return False


# Without a network, or with FISHEROPS_DOCS_OFFLINE set, names of other projects are printed without links.
if os.environ.get("FISHEROPS_DOCS_OFFLINE"):
    intersphinx_mapping = {}
else:
    with ThreadPoolExecutor(len(INVENTORIES)) as pool:
        found = pool.map(reachable, INVENTORIES.values())
        intersphinx_mapping = {
            name: (url, None) for (name, url), there in zip(INVENTORIES.items(), found, strict=True) if there
        }
intersphinx_timeout = 10
nitpick_ignore_regex = [
    (r"py:.*", r"(numpy|scipy|torch|cupy|cupyx|matplotlib)\..*"),
    (r"py:.*|std:.*|ref|term", r"(python|numpy):.*"),  # numpydoc's links to "int", "callable", "array_like"
]

# ---- Tutorials -----------------------------------------------------------------------------------

sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/plot_",
    "within_subsection_order": "ExampleTitleSortKey",
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
# Small problems: threads would only wait for each other.
torch.set_num_threads(1)
# Tutorials must not warn, apart from what matplotlib says when a picture is not shown in a window.
warnings.filterwarnings("ignore", message=".*non-interactive.*", category=UserWarning)

# ---- HTML ----------------------------------------------------------------------------------------

html_theme = "pydata_sphinx_theme"
html_title = f"fisherops {release}"
html_static_path = ["_static"]
html_css_files = ["pictures.css"]
html_show_sphinx = False
html_theme_options = {
    "logo": {"text": "fisherops"},
    "navigation_with_keys": False,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
