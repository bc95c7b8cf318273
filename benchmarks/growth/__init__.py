"""How a step grows: measured here, and on paper beyond."""
