"""Tasks of films, windows, code and tools, gathered: each of them is a file beside this one."""

from __future__ import annotations

from glmv_jax.rl.tasks import (
    code,
    compare,
    crop_read,
    event,
    gui_critic,
    gui_ground,
    gui_perceive,
    gui_step,
    gui_trajectory,
    svg,
    track,
    ui_code,
)

FAMILIES = (
    event, track, compare, crop_read, gui_perceive, gui_ground, gui_step, gui_trajectory, gui_critic, svg, code,
    ui_code,
)  # fmt: skip
TASKS = tuple(task for family in FAMILIES for task in family.TASKS)
