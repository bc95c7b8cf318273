"""What users hand over, as a formulation wants it: closures as losses, sets as faces."""
