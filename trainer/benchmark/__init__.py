"""The measurements behind ``python -m trainer.benchmark NAME``: one module a name, each with a function ``run``."""
