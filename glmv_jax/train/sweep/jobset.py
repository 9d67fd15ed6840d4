"""A JobSet for one run, from a file for people such as launch/gke_jobset.yaml."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from glmv_jax.typing import UserError

PLACEHOLDER = "my-bucket"  # of the shipped file
RESTARTS = 10  # of an arm at the most: a spot slice may go, but what fails again and again is to be told


def read(path: str) -> dict[str, Any]:
    """The file's one JobSet. UserError when it is none, or lacks what `render` fills in."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file)
        container = _container(found)
        names = {entry["name"] for entry in container["env"]}
        (_script, _zero, *_words) = container["args"]
    except (OSError, yaml.YAMLError, KeyError, IndexError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is no JobSet with one container ({reason}); see launch/gke_jobset.yaml") from None
    if found.get("kind") != "JobSet" or missing(names):
        lacks = "kind: JobSet" if found.get("kind") != "JobSet" else f"the variable {missing(names)[0]}"
        raise UserError(f"{path} lacks {lacks}; see launch/gke_jobset.yaml")
    return found


def missing(names: set[str]) -> list[str]:
    return [name for name in ("EXPERIMENT", "RUN", "CODE") if name not in names]


def bucket(template: dict[str, Any], given: str) -> str:
    """Of the runs: the given one, else the file's. UserError while it is still the file's example."""
    found = given or _volume(template)["bucketName"]
    if found == PLACEHOLDER:
        raise UserError(f"the JobSet's bucketName is still {PLACEHOLDER}; change it, or export GLMV_BUCKET")
    return found


def render(
    template: dict[str, Any], *, name: str, experiment: str, run: str, code: str, bucket: str, words: Sequence[str]
) -> dict[str, Any]:
    """The template with the name, variables, bucket and further words of `glmv train` of one run."""
    made = copy.deepcopy(template)
    made["metadata"]["name"] = name
    policy = made["spec"].setdefault("failurePolicy", {})
    policy["maxRestarts"] = min(policy.get("maxRestarts", 0), RESTARTS)
    _volume(made)["bucketName"] = bucket
    container = _container(made)
    values = {"EXPERIMENT": experiment, "RUN": run, "CODE": code}
    for entry in container["env"]:
        entry["value"] = values.get(entry["name"], entry.get("value"))
    container["args"] += words
    return made


def _pod(jobset: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]["template"]["spec"]


def _container(jobset: dict[str, Any]) -> dict[str, Any]:
    (container,) = _pod(jobset)["containers"]
    return container


def _volume(jobset: dict[str, Any]) -> dict[str, Any]:
    (volume,) = _pod(jobset)["volumes"]
    return volume["csi"]["volumeAttributes"]


def text(jobset: dict[str, Any]) -> str:
    """As YAML, scripts in it as they are."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def word(dumper: yaml.Dumper, value: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, word)
    return yaml.dump(jobset, Dumper=Dumper, sort_keys=False, width=1000, allow_unicode=True)
