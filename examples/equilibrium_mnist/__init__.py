"""A network given by its equilibrium, trained through three hypergradients."""
