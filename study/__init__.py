"""How good trained weights are, the ablations, and the README's figures."""
