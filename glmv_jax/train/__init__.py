"""Training: `main.run(config, workdir)` runs one stage; `loop.train` is the loop that all five stages share."""
