"""Losses: arrays in, scalars and metrics out; nothing here knows a model, a config or a stage.

Sums are over the whole (global) batch. Where a step is cut into micro-batches, pass the denominator of the whole step:
a mean of means is another loss.
"""
