"""`glmv show-batch`: the batch that a step of training takes, as the model is given it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from glmv_jax.data import showing, showing_html, showing_terminal
from glmv_jax.train import main
from glmv_jax.typing import UserError


def show_batch(cfg: ConfigDict, step: int = 1, html: str | None = None, console: Console | None = None) -> None:
    """Prints the batch of a step, from 1, or writes it as a page. The data of the steps before are read through.

    UserError: a stage whose batches have no text, a step below 1, or a page that cannot be written.
    """
    if step < 1:
        raise UserError(f"--step {step}: steps count from 1")
    stage: Any = main.stage_class(cfg.stage)(cfg)
    if not hasattr(stage, "tokenizer") or not hasattr(stage, "builder"):
        raise UserError(f"show-batch shows packed texts, and stage {cfg.stage} has none; give an experiment of stage "
                        "pretrain, sft or rl")
    data = stage.train_data()
    try:
        for _ in range(step):
            batch = next(data)
    finally:
        data.close()
    documents = showing.read(batch, stage.tokenizer, stage.names, stage.model.vision.patch)
    title = f"{cfg.stage}, step {step}, {len(documents)} documents"
    if html is None:
        showing_terminal.show(documents, showing.budgets(batch), title, console or Console())
        return
    try:
        Path(html).write_text(showing_html.page(documents, showing.budgets(batch), title), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {html} cannot be written ({error.strerror}); give another file") from None
    print(f"{title}: {html}")
