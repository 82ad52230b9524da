"""Share models: the card of an export, the way to the hub, and the model that lmms_eval scores."""
