"""Self-contained HTML pages: templates whose inserted values are all escaped, without network access and scripts."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mvd_scale.evaluation.results import percent


def render_page(template: str, **values: Any) -> str:
    """Render a page.

    Args:
        template: file of this package that extends `page.html`.
        values: its variables; strings are escaped, figures of `to_svg` are not.
    """
    environment = Environment(
        loader=PackageLoader("mvd_scale", "visualization"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment.get_template(template).render(**values)
