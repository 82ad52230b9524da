"""Compare variants of one configuration over several seeds."""
