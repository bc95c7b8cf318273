"""The analytic problems, by ``minimize`` and by the optimizer."""
