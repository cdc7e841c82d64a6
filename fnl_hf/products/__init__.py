"""Which products of parameters a model has, and what training does to them."""
