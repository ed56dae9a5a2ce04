"""Find the variables that a chat template reads, and those that a request can set."""

from jinja2 import meta, nodes

RESERVED = frozenset(("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"))


def find_variables(template: nodes.Template) -> frozenset[str]:
    """Return the names of the variables that the template reads before setting them on some path."""
    return frozenset(meta.find_undeclared_variables(template))


def find_options(template: nodes.Template) -> frozenset[str]:
    """Return the names of the variables that a request can set with `chat_template_kwargs`.

    These are the variables that it reads except the reserved ones. A variable that the template sets itself counts only
    if the template gives it a default.
    """
    own = {name.name for name in template.find_all(nodes.Name) if name.ctx == "store"}
    return find_variables(template) - RESERVED - (own - _with_default(template))


def _with_default(template: nodes.Template) -> set[str]:
    """Return the names that the template tests or defaults: `x is defined`, `x | default(1)`."""
    tests = [test for test in template.find_all(nodes.Test) if test.name in ("defined", "undefined")]
    filters = [each for each in template.find_all(nodes.Filter) if each.name in ("default", "d")]
    return {each.node.name for each in [*tests, *filters] if isinstance(each.node, nodes.Name)}
