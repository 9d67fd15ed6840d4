"""What the comparisons of training steps share: sides that take steps with AdamW, ours and PyTorch's, and are timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Spec = dict[str, Any]
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the losses of the first steps, relative


class Side:
    """spec: has "checked". A subclass has step() -> loss, and wait(loss)."""

    spec: Spec

    def prepare(self) -> dict[str, Any]:
        """Compiles, and takes the first steps; their losses are compared."""
        began = time.monotonic()
        losses = [float(self.step()) for _ in range(self.spec["checked"])]
        return {"losses": losses, "seconds": time.monotonic() - began}

    def turn(self, steps: int, warm: int) -> list[float]:
        """Seconds of one step: on the clock, and of processors (of all threads together)."""
        for _ in range(warm):
            self.wait(self.step())
        began = time.perf_counter(), time.process_time()
        for _ in range(steps):
            loss = self.step()
        self.wait(loss)
        return [(time.perf_counter() - began[0]) / steps, (time.process_time() - began[1]) / steps]


class OnJax(Side):
    def __init__(self, spec: Spec) -> None:
        from glmv_jax.parallel.host import prepare_memory

        prepare_memory()  # as `glmv train` does before anything else
        import jax

        self.jax, self.spec = jax, spec

    def learn(self, loss_fn: Callable, params: Any, adam: dict[str, float], *data: Any) -> None:
        """Compiles a step on loss_fn(params, *data)."""
        import optax

        jax = self.jax
        optimizer = optax.adamw(adam["lr"], adam["b1"], adam["b2"], adam["eps"], weight_decay=adam["weight_decay"])

        def step(params, state, *data):
            loss, grads = jax.value_and_grad(loss_fn)(params, *data)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        self._state, self._data = (params, jax.jit(optimizer.init)(params)), data
        self._step = jax.jit(step, donate_argnums=(0, 1)).lower(*self._state, *data).compile()

    def step(self):
        *self._state, loss = self._step(*self._state, *self._data)
        return loss

    def wait(self, loss) -> None:
        loss.block_until_ready()

    def memory(self) -> float | None:
        """GB, the most there was on the device; None on a CPU."""
        stats = self.jax.devices()[0].memory_stats()
        return stats["peak_bytes_in_use"] / 1e9 if stats else None


class OnTorch(Side):
    """spec: has "threads" and "device". A subclass sets `model`, calls `learn` and has loss() -> a tensor."""

    def __init__(self, spec: Spec) -> None:
        import torch

        torch.set_num_threads(spec["threads"])
        self.torch, self.spec, self.place = torch, spec, torch.device(spec["device"])

    def learn(self, adam: dict[str, float]) -> None:
        self.optimizer = self.torch.optim.AdamW(
            self.model.parameters(), adam["lr"], (adam["b1"], adam["b2"]), adam["eps"], adam["weight_decay"], fused=True
        )

    def step(self):
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def wait(self, loss) -> None:
        loss.item()
        if self.place.type == "cuda":
            self.torch.cuda.synchronize()

    def half(self):
        """Products in bfloat16 where the spec says so."""
        return self.torch.autocast(self.place.type, self.torch.bfloat16, enabled=self.spec["dtype"] == "bfloat16")

    def memory(self) -> float | None:
        return self.torch.cuda.max_memory_allocated() / 1e9 if self.place.type == "cuda" else None
