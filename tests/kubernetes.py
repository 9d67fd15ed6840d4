"""What Kubernetes takes of a JobSet and of a RayCluster: the fields that launch/ uses, with their types.

As the definitions of jobset.x-k8s.io/v1alpha2 (JobSet 0.9) and ray.io/v1 (KubeRay 1.4) have them. A field that is not
here is a complaint, as it is for an API server that validates strictly: most often it is misspelt, or stands in the
wrong place.
"""

from __future__ import annotations

import re
from typing import Any

# A type, a tuple of the words allowed, [of each item], {field: of its value} with ! behind what must be there, or
# {str: of every value} for a map with keys of one's own.
_QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?")
_STRINGS = {str: str}
_META = {"name": str, "namespace": str, "labels": _STRINGS, "annotations": _STRINGS}
_CONTAINER = {
    "name!": str, "image": str, "command": [str], "args": [str],
    "env": [{"name!": str, "value": str}],
    "ports": [{"containerPort!": int, "name": str, "protocol": ("TCP", "UDP", "SCTP")}],
    "resources": {"limits": {str: _QUANTITY}, "requests": {str: _QUANTITY}},
    "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool, "subPath": str}],
}  # fmt: skip
_POD = {
    "metadata": _META,
    "spec": {
        "containers!": [_CONTAINER], "serviceAccountName": str, "hostNetwork": bool, "nodeSelector": _STRINGS,
        "restartPolicy": ("Always", "OnFailure", "Never"), "terminationGracePeriodSeconds": int,
        "dnsPolicy": ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
        "tolerations": [{"key": str, "operator": ("Exists", "Equal"), "value": str,
                         "effect": ("NoSchedule", "PreferNoSchedule", "NoExecute")}],
        "volumes": [{"name!": str, "csi": {"driver!": str, "readOnly": bool, "volumeAttributes": _STRINGS}}],
    },
}  # fmt: skip
_EXIT_CODES = {"containerName": str, "operator!": ("In", "NotIn"), "values!": [int]}
_JOB = {
    "parallelism": int, "completions": int, "backoffLimit": int, "completionMode": ("Indexed", "NonIndexed"),
    "podFailurePolicy": {
        "rules!": [{"action!": ("FailJob", "FailIndex", "Ignore", "Count"), "onExitCodes": _EXIT_CODES}],
    },
    "template!": _POD,
}  # fmt: skip
_RULE = {
    "name!": str, "action!": ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
    "onJobFailureReasons": [("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded",
                             "PodFailurePolicy")],
    "targetReplicatedJobs": [str],
}  # fmt: skip
JOBSET = {
    "apiVersion!": ("jobset.x-k8s.io/v1alpha2",), "kind!": ("JobSet",), "metadata!": _META,
    "spec!": {
        "failurePolicy": {"maxRestarts": int, "rules": [_RULE]},
        "replicatedJobs": [{"name!": str, "replicas": int, "template!": {"metadata": _META, "spec": _JOB}}],
    },
}  # fmt: skip
_GROUP = {"rayStartParams": _STRINGS, "template!": _POD}
RAY_CLUSTER = {
    "apiVersion!": ("ray.io/v1",), "kind!": ("RayCluster",), "metadata!": _META,
    "spec!": {
        "rayVersion": str, "enableInTreeAutoscaling": bool, "headGroupSpec!": _GROUP,
        "workerGroupSpecs": [{"groupName!": str, "replicas": int, "minReplicas!": int, "maxReplicas!": int,
                              "numOfHosts": int, **_GROUP}],
    },
}  # fmt: skip


def complaints(value: Any, schema: Any, at: str = "") -> list[str]:
    """What is wrong with a parsed YAML document, a line each; [] when nothing is."""
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{at}: {value!r} is no list"]
        return [text for i, item in enumerate(value) for text in complaints(item, schema[0], f"{at}[{i}]")]
    if isinstance(schema, dict):
        return _of_object(value, schema, at)
    if isinstance(schema, tuple):
        return [] if value in schema else [f"{at}: {value!r} is none of {', '.join(schema)}"]
    if isinstance(schema, re.Pattern):
        good = isinstance(value, int) or isinstance(value, str) and schema.fullmatch(value)
        return [] if good else [f"{at}: {value!r} is no quantity"]
    good = isinstance(value, schema) and (schema is bool or not isinstance(value, bool))
    return [] if good else [f"{at}: {value!r} is no {schema.__name__}"]


def _of_object(value: Any, schema: dict[Any, Any], at: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{at}: {value!r} is no object"]
    if str in schema:
        wrong = [f"{at}.{key}: the key is no string" for key in value if not isinstance(key, str)]
        return wrong + [text for key, one in value.items() for text in complaints(one, schema[str], f"{at}.{key}")]
    fields = {name.rstrip("!"): inner for name, inner in schema.items()}
    wrong = [f"{at}: lacks {name[:-1]}" for name in schema if name.endswith("!") and name[:-1] not in value]
    wrong += [f"{at}.{key}: unknown field" for key in value if key not in fields]
    return wrong + [
        text for key, one in value.items() if key in fields for text in complaints(one, fields[key], f"{at}.{key}")
    ]
