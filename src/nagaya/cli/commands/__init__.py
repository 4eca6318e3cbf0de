"""One module per command; `catalog` says which."""
