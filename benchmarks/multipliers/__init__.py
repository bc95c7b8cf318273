"""Rules for the multiplier, the published one and the default among them."""
