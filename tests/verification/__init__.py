"""Keep a verification card for each shipped configuration: what was checked, and what was not yet."""
