"""Which part of the model an operation of a compiled program came from, by the path in its metadata."""

from __future__ import annotations

import re

_WRAPPED = re.compile(r"^(?:transpose|jvp|vmap|remat|checkpoint|custom_jvp|custom_vjp)\((.*)\)$")
_JIT = re.compile(r"^p?jit\(.*\)$")
# Of JAX and of the stack of layers: they say how a part is run, not which it is.
_HOW = frozenset("while body cond closed_call checkpoint rematted_computation remat pjit custom_vjp_call "
                 "custom_vjp_call_jaxpr custom_jvp_call core_call shard_map scan blocks layers".split())  # fmt: skip
DEPTH = 3  # names of a part's path


def part(scope: str) -> tuple[str, str]:
    """(path of modules, "forward", "recomputed", "backward" or "") of an op_name; ("no name", "") without one."""
    if not scope:
        return "no name", ""
    names, way = [], ""
    *path, _ = scope.partition(";")[0].split("/")  # the last is the operation; of several merged ones the first
    for name in path:
        if name.startswith("transpose("):
            way = "backward"
        elif name.startswith("jvp(") and not way:
            way = "forward"
        elif name == "rematted_computation":
            way = "recomputed"
        while found := _WRAPPED.match(name):
            name = found[1]
        name = name.rpartition(".")[2]  # of a method of a module its name alone
        how = _JIT.match(name) or name in _HOW or re.fullmatch(r"(blocks|layer)\d*", name)
        if name and not how and names[-1:] != [name]:
            names.append(name)
    return "/".join(names[:DEPTH]) or "no name", way
