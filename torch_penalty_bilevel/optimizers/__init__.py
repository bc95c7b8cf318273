"""Both optimizers, from two ordinary rules (``two_level``) up to the loop of one step."""
