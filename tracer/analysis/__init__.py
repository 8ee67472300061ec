"""Pure computation over recordings: pandas and numpy, no root, no bcc, no printing."""
