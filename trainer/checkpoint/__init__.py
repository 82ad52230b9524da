"""Save, find, verify, restore and remove the checkpoints of a run."""
