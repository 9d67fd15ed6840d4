"""Which parameter is trained how: regular expressions on slash paths, the first that matches the whole path wins.

    optim = dict(
        lr=1e-3, clip=1.0, schedule=dict(warmup=0.02, decay="cosine", final=0.1),
        groups=[
            ("vision/.*",            dict(kind="frozen")),
            (".*/blocks/.*/kernel",  dict(kind="muon", wd=0.1)),
            ("head/.*",              dict(kind="adamw", lr_mult=0.1, schedule=dict(decay="linear"))),
            (".*",                   dict(kind="adamw")),
        ])

Every parameter must be covered and every expression must be used, so that a renamed module stops the run instead of
quietly training another way. A frozen parameter has no optimiser state and an update of exactly zero.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from glmv_jax.config import nearest
from glmv_jax.optim.ema import average_params
from glmv_jax.optim.muon import muon
from glmv_jax.optim.schedules import schedule
from glmv_jax.trees import flatten, slash_path
from glmv_jax.typing import Params, UserError

_TOP_KEYS = ("lr", "schedule", "clip", "groups", "freeze", "ema")
_COMMON_KEYS = ("kind", "lr_mult", "wd", "schedule", "name")
_KIND_KEYS = {
    "muon": (*_COMMON_KEYS, "momentum", "nesterov", "steps", "dtype", "scaling", "heads"),
    "adamw": (*_COMMON_KEYS, "betas", "eps", "decay_vectors"),
    "frozen": ("kind",),
}
# A scan stacks the [D] scale of a norm to [L, D], so the number of dimensions alone does not tell a vector.
_VECTOR_NAME = re.compile(r"(.*_)?(scale|bias|gain)")


def plan(cfg: Any) -> dict[str, Any]:
    """What `build` takes, from the config of a run: cfg.optim with cfg.freeze, cfg.ema, and for a run that trains
    adapters (cfg.lora) their groups in place of those of the model."""
    optim, lora = dict(cfg.optim.items()), cfg.get("lora", {})
    if lora.get("rank", 0):
        optim["groups"] = lora["groups"]
    return optim | {"freeze": tuple(cfg.get("freeze", ())), "ema": cfg.get("ema", 0.0)}


def build(
    cfg: Any, params: Params, total_steps: int, shardings: Params | None = None
) -> optax.GradientTransformation:
    """The optimiser of a run.

    Args:
      cfg: lr; schedule (see `schedules.schedule`; default constant); clip: largest global norm of the gradient of the
        trained parameters, 0 or absent for none; groups: a list of (regex, settings), settings being
          kind      "muon" | "adamw" | "frozen"
          lr_mult   times cfg.lr, default 1
          wd        decoupled weight decay (times the learning rate), default 0. AdamW leaves vectors alone: leaves of
                    one dimension, or whose name is scale, bias or gain; decay_vectors=True decays them too
          schedule  in place of cfg.schedule
          name      what its learning rate is logged as, "lr/NAME"; for the log alone
          muon      momentum 0.95, nesterov True, steps 5, dtype "float32", scaling "rms" ("spectral"), heads 1: as
                    `muon.scale_by_muon`
          adamw     betas (0.9, 0.95), eps 1e-8
        freeze: regular expressions of what is not trained, whatever its group; ema: decay of a running average of the
        trained parameters (`ema.averaged`), 0 or absent for none.
      params: the parameters, or their shapes.
      total_steps: updates in the run, for the schedules.
      shardings: where the parameters live; with it Muon's matrices are shared out among the devices.

    Raises: UserError for unknown keys, uncovered parameters, and expressions that match nothing.
    """
    _check_keys("optim", cfg, _TOP_KEYS)
    groups = _groups(cfg)
    labels = _labels(cfg, groups, params)
    members: dict[str, list[tuple[str, Any]]] = {str(i): [] for i in range(len(groups))}
    for (path, leaf), label in zip(flatten(params).items(), jax.tree.leaves(labels), strict=True):
        members[label].append((path, leaf))

    where = None if shardings is None else flatten(shardings)
    transforms = {
        label: _named(groups[int(label)][1]["kind"], _transform(cfg, *groups[int(label)], rows, total_steps, where))
        for label, rows in members.items()
        if rows
    }
    steps = [optax.partition(transforms, labels)]
    if cfg.get("clip", 0):
        # The norm is that of what will be applied: a frozen tower must not shrink everybody's update.
        steps.insert(0, _named("clip", optax.masked(optax.clip_by_global_norm(cfg["clip"]), trainable(cfg, params))))
    if cfg.get("ema", 0):
        steps.append(_named("ema", optax.masked(average_params(cfg["ema"]), trainable(cfg, params))))
    return optax.chain(*steps)


def trainable(cfg: Any, params: Params) -> Params:
    """The tree of `params` with True where a leaf is trained and False where its group is frozen."""
    groups = _groups(cfg)
    return jax.tree.map(lambda label: groups[int(label)][1]["kind"] != "frozen", _labels(cfg, groups, params))


def learning_rates(cfg: Any, total_steps: int) -> Callable[[int], dict[str, float]]:
    """For logging: from the number of updates already made to {"lr": that of a group with lr_mult 1 and no schedule of
    its own, "lr/NAME": that of each group with a name}. UserError for a name that two groups have."""
    rates = {"lr": _rate(cfg, {}, total_steps)}
    for regex, settings in _groups(cfg):
        name = f"lr/{settings.get('name', '')}"
        if name in rates:
            raise UserError(f"optim group {regex!r}: another one is called {settings['name']!r} too; rename one")
        if name != "lr/":
            rates[name] = _rate(cfg, settings, total_steps)
    return lambda count: {name: float(rate(count)) for name, rate in rates.items()}


def _groups(cfg: Any) -> list[tuple[str, dict[str, Any]]]:
    """Those of cfg.groups behind one for each expression of cfg.freeze."""
    groups = []
    for regex, settings in [*((regex, {"kind": "frozen"}) for regex in cfg.get("freeze", ())), *cfg["groups"]]:
        settings = dict(settings.items())
        kind = settings.get("kind")
        if kind not in _KIND_KEYS:
            raise UserError(f"optim group {regex!r}: kind={kind!r} is not one of {', '.join(_KIND_KEYS)}")
        _check_keys(f"optim group {regex!r} ({kind})", settings, _KIND_KEYS[kind])
        try:
            re.compile(regex)
        except re.error as error:
            raise UserError(f"optim group {regex!r} is not a regular expression: {error}") from error
        groups.append((regex, settings))
    return groups


def _labels(cfg: Any, groups: list[tuple[str, dict[str, Any]]], params: Params) -> Params:
    """The index, as a string, of the group each leaf belongs to."""
    paths = list(flatten(params))
    match = lambda path, start=0: next(  # noqa: E731
        (str(i) for i, (r, _) in enumerate(groups) if i >= start and re.fullmatch(r, path)), None
    )
    first = {path: match(path) for path in paths}
    # What cfg.freeze takes from a group is not missed there.
    used = {*first.values(), *(match(path, len(cfg.get("freeze", ()))) for path in paths)}
    missing = [path for path in paths if first[path] is None]
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise UserError(f"optim.groups: no expression matches {shown}; add one (kind='frozen' to leave it alone)")
    for i, (regex, _) in enumerate(groups):
        if str(i) in used or regex == ".*":
            continue
        taken = [path for path in paths if re.fullmatch(regex, path)]
        if taken:
            raise UserError(
                f"optim.groups: {regex!r} is never used, earlier expressions took all it matches ({taken[0]} ...); "
                "move it up or remove it"
            )
        inside = next((path for path in paths if re.search(regex, path)), None)
        plain = re.sub(r"[^\w/]", "", regex)
        hint = (
            f"an expression must match the whole path, as '.*{regex}.*' does {inside}"
            if inside
            else f"the nearest paths are {', '.join(difflib.get_close_matches(plain, paths, 3, 0.0))}"
        )
        raise UserError(f"optim.groups: {regex!r} matches no parameter; {hint}")
    return jax.tree.unflatten(jax.tree.structure(params), [first[path] for path in paths])


def _named(name: str, transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same, its operations under a name of `parallel.scopes`."""
    return optax.GradientTransformation(transform.init, jax.named_scope(name)(transform.update))


def _transform(
    cfg: Any, regex: str, settings: dict[str, Any], leaves: list[tuple[str, Any]], total_steps: int, shardings: Any
) -> optax.GradientTransformation:
    kind, wd = settings["kind"], settings.get("wd", 0.0)
    if kind == "frozen":
        return optax.set_to_zero()
    rate = _rate(cfg, settings, total_steps)
    if kind == "muon":
        flat = [path for path, leaf in leaves if len(leaf.shape) < 2]
        if flat:
            raise UserError(f"optim group {regex!r}: Muon is for matrices, {flat[0]} is a vector; give it to AdamW")
        heads = settings.get("heads", 1)
        odd = [path for path, leaf in leaves if heads < 1 or leaf.shape[-1] % heads]
        if odd:
            raise UserError(f"optim group {regex!r}: the columns of {odd[0]} do not divide into heads={heads}")
        options = {k: settings[k] for k in ("momentum", "nesterov", "steps", "scaling", "heads") if k in settings}
        return muon(rate, wd, dtype=jnp.dtype(settings.get("dtype", "float32")), shardings=shardings, **options)
    b1, b2 = settings.get("betas", (0.9, 0.95))
    decayed = None if settings.get("decay_vectors") else _decayed
    return optax.adamw(rate, b1, b2, settings.get("eps", 1e-8), weight_decay=wd, mask=decayed)


def _rate(cfg: Any, settings: dict[str, Any], total_steps: int) -> Callable[[Any], Any]:
    plan = settings.get("schedule") or cfg.get("schedule", {"decay": "constant"})
    return schedule(plan, cfg["lr"] * settings.get("lr_mult", 1.0), total_steps)


def _decayed(params: Params) -> Params:
    """True for the leaves that are not vectors."""

    def matrix(path: tuple, leaf: Any) -> bool:
        return len(leaf.shape) > 1 and not _VECTOR_NAME.fullmatch(slash_path(path).rsplit("/", 1)[-1])

    return jax.tree_util.tree_map_with_path(matrix, params)


def _check_keys(where: str, cfg: Any, known: tuple[str, ...]) -> None:
    for key in cfg.keys():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, known)}")
