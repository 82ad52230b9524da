"""Load an export and answer prompts with it, for the commands that talk to one model."""
