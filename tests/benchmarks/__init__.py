"""Time and memory of hypergradients, as ratios to the same training without them."""
