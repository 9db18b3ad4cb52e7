"""The HTML templates of this folder: what they are read with, and the filters they may use."""

from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template

from sparsify_compiler.export.report_rows import duration, number, printable, size


def page_template(name: str) -> Template:
    """Read a template. Text from a model or a user is escaped, and what cannot be shown is made visible."""
    environment = Environment(
        loader=FunctionLoader(lambda part: files("sparsify_compiler.export").joinpath(part).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters.update(size=size, duration=duration, number=number)
    return environment.get_template(name)
