"""The products of parameters in a model, and how training changes them."""
