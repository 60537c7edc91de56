"""The routes: they translate between HTTP and the model, and decide nothing else."""
