"""Sweeps: one config with every combination of some values and seeds, each a run of its own in a process of its own,
here or on machines of its own elsewhere.

    DIR/sweep.json             what was asked, the state of every run, and at the end the numbers of every arm
        option=masked,seed=0/  the work directory of one run, as `glmv train` makes it, and train.log: what it printed
        report.html            curves with their spread over seeds, tables, paired differences

`main.run(...)` runs or goes on with one, `launchers` says where. Nothing here imports jax: accelerators are free for
the runs.
"""
