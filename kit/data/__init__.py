"""Data sets, what is wrong with them, and the batches that training takes from them."""
