"""Turn the members of one sample into a row of tokens and media."""
