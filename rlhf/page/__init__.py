"""A page in the browser: base and tuned side by side, and a blind vote between them."""
