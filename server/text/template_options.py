"""Which variables a chat template reads, and which of them a request may set."""

from jinja2 import meta, nodes

RESERVED = frozenset(("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"))


def find_variables(template: nodes.Template) -> frozenset[str]:
    """Names that the template reads of what it is given."""
    return frozenset(meta.find_undeclared_variables(template))


def find_options(template: nodes.Template) -> frozenset[str]:
    """Names among them that are not always there. A name that the template sets itself counts if it has a default."""
    own = {name.name for name in template.find_all(nodes.Name) if name.ctx == "store"}
    return find_variables(template) - RESERVED - (own - _with_default(template))


def _with_default(template: nodes.Template) -> set[str]:
    """Names that the template asks for whether they are there: `x is defined`, `x | default(1)`."""
    tests = [test for test in template.find_all(nodes.Test) if test.name in ("defined", "undefined")]
    filters = [each for each in template.find_all(nodes.Filter) if each.name in ("default", "d")]
    return {each.node.name for each in [*tests, *filters] if isinstance(each.node, nodes.Name)}
