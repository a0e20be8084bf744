"""A page in the browser: make videos, see base and tuned side by side, vote without knowing which."""
