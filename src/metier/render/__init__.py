"""How results look on a terminal: plain tables, colour only where somebody looks, NO_COLOR respected."""
